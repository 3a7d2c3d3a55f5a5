"""What the figures draw: numbers read back from the artists and compared with numbers computed here."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from dsv4lab import viz


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def line(ax: Axes, label: str) -> np.ndarray:
    """The y data of the line whose label starts so."""
    return next(np.asarray(a.get_ydata()) for a in ax.lines if str(a.get_label()).startswith(label))


def texts(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.texts]


def test_attention_marks_the_selection_and_stacks_the_shares() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(12), (2, 5))
    selected = np.array([[0, 2], [3, -1], [-1, -1], [1, 4], [4, 0]])
    axs = viz.plot_attention(
        weights[..., :6], weights[..., 6:11], weights[..., 11],
        query_start=40, key_start=35, tokens_per_entry=4, selected=selected,
    )  # fmt: skip
    dots = {(int(x), int(y)) for x, y in axs[0].collections[0].get_offsets()}
    assert dots == {(e, 40 + s) for s, row in enumerate(selected) for e in row if e >= 0}
    widths = np.array([p.get_width() for p in axs[2].patches]).reshape(3, 5)
    mean = weights.mean(axis=0)
    np.testing.assert_allclose(widths, [mean[:, 6:11].sum(1), mean[:, :6].sum(1), mean[:, 11]])
    np.testing.assert_allclose(axs[1].images[0].get_array(), mean[:, :6])
    assert axs[1].images[0].get_extent()[0] == 34.5


def test_one_head_of_an_attention_map() -> None:
    weights = np.random.default_rng(1).dirichlet(np.ones(7), (3, 4))
    axs = viz.plot_attention(
        weights[..., :3], weights[..., 3:6], weights[..., 6], query_start=0, key_start=0, tokens_per_entry=128, head=2
    )
    np.testing.assert_allclose(axs[0].images[0].get_array(), weights[2, :, 3:6])


def test_index_scores_draw_the_boundary_at_the_visible_count() -> None:
    visible = np.array([2, 2, 3, 5])
    ax = viz.plot_index_scores(np.arange(20.0).reshape(4, 5), visible=visible, query_start=9)
    shown = ax.images[0].get_array()
    assert np.ma.getmaskarray(shown).sum(1).tolist() == (5 - np.asarray(visible)).tolist()  # the rest may be anything
    boundary = ax.lines[0]
    np.testing.assert_array_equal(np.asarray(boundary.get_xdata())[::2], visible - 0.5)
    assert boundary.get_ydata()[0] == 8.5 and boundary.get_ydata()[-1] == 12.5


def test_signed_scores_are_centred_on_zero() -> None:
    norm = viz.plot_index_scores(np.array([[-1.0, 3.0]])).images[0].norm
    assert (norm.vmin, norm.vmax) == (-3.0, 3.0)


def test_balanced_line_is_the_mean_load_of_each_layer() -> None:
    counts = np.array([[4, 0, 2], [9, 9, 9]])
    axs = viz.plot_expert_load(counts)
    drawn = next(a for a in axs[1].lines if a.get_label() == "balanced").get_xdata()
    assert list(drawn) == [2, 9, 9]
    np.testing.assert_allclose(axs[0].images[0].get_array(), counts / [[2], [9]])


def test_mixing_shows_old_streams_as_rows() -> None:
    comb = np.random.default_rng(2).dirichlet(np.ones(3), (2, 3))
    axs = viz.plot_mhc_mixing(comb)
    np.testing.assert_allclose(axs[1].images[0].get_array(), comb[1])
    assert axs[0].get_ylabel() == "old stream j" and axs[0].get_xlabel() == "new stream i"
    assert texts(axs[0])[1] == f"{comb[0, 0, 1]:.2f}"[1:]


def test_silent_stream_leaves_the_others_readable() -> None:
    rms = np.ones((3, 5, 2))
    rms[..., 1] = 0.0
    ax = viz.plot_stream_norms(rms)
    ax.figure.canvas.draw()
    assert ax.get_ylim()[0] > 0.1 and ax.get_ylim()[1] < 10


def test_sinkhorn_measures_rows_and_columns() -> None:
    steps = np.zeros((1, 1, 2, 2))
    steps[0, 0] = [[0.5, 0.25], [0.5, 0.75]]  # columns sum to 1, rows to 0.75 and 1.25
    ax = viz.plot_sinkhorn(steps)
    assert line(ax, "row sums") == pytest.approx(0.25)
    assert line(ax, "column sums") == pytest.approx(np.finfo(np.float32).eps)


def test_cosine_line_is_the_median_gap_and_up_is_better() -> None:
    cosines = np.array([[0.9, 0.99, 0.999], [0.5, 0.6, 0.7]])
    ax = viz.plot_cosine_depth({"x": cosines}, bar=0.8)
    np.testing.assert_allclose(line(ax, "x"), [0.01, 0.4])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    ax.figure.canvas.draw()
    assert {"0.9", "0.99"} <= {t.get_text() for t in ax.get_yticklabels()}


def test_error_histogram_counts_every_value() -> None:
    errors = np.concatenate([np.zeros(50), np.geomspace(1e-6, 1, 150)])
    ax = viz.plot_error_histogram({"x": errors}, quantiles=(0.5,))
    share = ax.patches[0].get_data().values
    assert share.sum() == pytest.approx(75.0)
    legend = [t.get_text() for t in ax.get_legend().get_texts()]
    assert legend[0] == "x, 25 % exact" and legend[1] == f"50 % below {np.quantile(errors, 0.5):.2g}"


def test_codes_are_ordered_by_value_with_both_zeros() -> None:
    values = np.array([0.0, 1.0, -0.0, -1.0])
    ax = viz.plot_code_histogram(np.array([0, 0, 1, 2, 3, 3, 3, 3]), values)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["-1\n3", "-0\n2", "0\n0", "1\n1"]
    np.testing.assert_allclose([p.get_height() for p in ax.patches], [50, 12.5, 25, 12.5])


def test_scales_fall_into_their_octave() -> None:
    ax = viz.plot_scale_histogram(np.array([0.0, 1.0, 1.5, 4.0]), bins_per_octave=1)
    data = ax.patches[0].get_data()
    np.testing.assert_allclose(data.edges, [0, 1, 2, 3])
    np.testing.assert_allclose(data.values, [50, 0, 25])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["25 % zero"]


def test_number_grid_log2_drops_zero_and_signs() -> None:
    ax = viz.plot_number_grid({"f": np.array([-2.0, -1.0, 0.0, 1.0, 2.0])}, log2=True)
    assert [s[0][0] for s in ax.collections[0].get_segments()] == [1.0, 2.0]
    assert ax.get_yticklabels()[0].get_text() == "f\n5 values"


def test_anatomy_is_the_relative_error_per_bin() -> None:
    ax = viz.plot_error_anatomy(np.array([1.0, -1.0, 100.0]), {"f": np.array([1.5, -1.0, 0.0])}, num_bins=2)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.25, 1.0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.5, 1.0])


def test_pages_show_their_owner_and_the_fill_of_the_last() -> None:
    axs = viz.plot_cache_pages([[2, 0], [1, -1]], [160, 0], num_pages=4, page_tokens=128)
    assert sorted(texts(axs[0])) == ["0:0", "0:1", "1:0"]
    assert texts(axs[1]) == ["2", "0", "1"]
    filled = [p.get_height() / 0.84 for p in axs[1].patches if p.get_linewidth() == 0]
    np.testing.assert_allclose(filled, [1.0, 0.25])
    assert axs[0].get_legend().get_texts()[-1].get_text() == "free, 1 of 4 pages"


def test_ring_marks_the_newest_and_the_misplaced() -> None:
    ax = viz.plot_window_ring(np.array([[4, 5, 2, 3], [0, 9, -1, -1], [-1, 6, -1, -1]]))
    found = {str(c.get_label()): c.get_offsets() for c in ax.collections}
    assert [int(x) for x, _ in found["newest"]] == [1, 1, 1]
    assert [int(x) for x, _ in found["misplaced (1)"]] == [1]
    assert ax.get_yticklabels()[1].get_text() == "ring 1: 0 to 9"


def test_roofline_percent_uses_the_bound_that_applies() -> None:
    ax = viz.plot_roofline(
        [1.0, 1000.0], [1.0, 400.0], ["slow", "fast"], bandwidth=4.0, ceilings={"a": 800.0, "b": 1600.0}, ceiling_of=["a", "a"]
    )
    assert texts(ax) == ["slow 25 %", "fast 50 %"]


def test_labels_of_close_points_do_not_overlap() -> None:
    intensity = 300 * 1.02 ** np.arange(6)
    names = [f"kernel {i}" for i in range(6)]
    ax = viz.plot_roofline(intensity, np.full(6, 500.0), names, bandwidth=4.8, ceilings={"BF16": 989.0})
    ax.figure.canvas.draw()
    boxes = [matplotlib.text.Text.get_window_extent(t) for t in ax.texts]
    pairs = [(i, j) for i in range(6) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert pairs == []


def test_training_curve_writes_the_last_held_out_loss() -> None:
    ax = viz.plot_training_curve(np.arange(200), np.linspace(5, 2, 200), held_out=([50, 150], [4.5, 2.75]))
    assert [t.get_text() for t in ax.get_legend().get_texts()][-1] == "held out, last 2.750"
    assert line(ax, "training, each").shape == (200,)


def test_perplexity_bars_are_percent_over_the_reference() -> None:
    ax = viz.plot_perplexity({"a": 5.0, "b": 5.1, "c": 4.9}, "a", limits={"b": 0.03})
    np.testing.assert_allclose([p.get_height() for p in ax.patches], [0, 2, -2], atol=1e-9)
    assert texts(ax) == ["5.000\n(reference)", "5.100\n+2.00 %", "4.900\n-2.00 %", "+3 %"]


def test_acceptance_interval_is_wilsons() -> None:
    ax = viz.plot_mtp_acceptance([50, 10], [100, 10])
    whiskers = np.array([[s[0][1], s[1][1]] for s in ax.collections[0].get_segments()])
    # published 95 % Wilson limits of 50/100 and 10/10
    np.testing.assert_allclose(whiskers, [[40.38, 59.62], [72.25, 100.0]], atol=0.01)


def test_shape_tour_writes_every_stage_and_its_shape() -> None:
    rows = [("in", (1, 5), "ids"), ("mid", ("B", 5, 96), "x"), ("out", "(1, 5, V)", "y")]
    ax = viz.plot_shape_tour(rows, branch=[("side", (1, 2), "z")], branch_from="mid")
    assert {"in", "(1, 5)", "(B, 5, 96)", "(1, 5, V)", "side", "(1, 2)", "z"} <= set(texts(ax))


def test_predicted_draws_both_numbers_and_their_ratio() -> None:
    ax = viz.plot_predicted({"a": 2.0, "b": 10.0}, {"b": 5.0, "a": 3.0}, quantity="error (no unit)", bounds={"b": 20.0})
    predicted = next(line for line in ax.get_lines() if line.get_label() == "predicted")
    assert predicted.get_xdata().tolist() == [2.0, 10.0]
    assert [t.get_text() for t in ax.texts][:2] == ["x 1.500", "x 0.500"]
    assert ax.get_xlim()[1] > 20.0


def test_scale_layout_joins_the_bytes_in_memory_order() -> None:
    offsets = np.array([[4, 0], [1, 3]])
    axs = viz.plot_scale_layout({"x": offsets}, num_marked=3)
    line = axs[0].get_lines()[0]
    assert list(zip(line.get_ydata(), line.get_xdata(), strict=True)) == [(0, 1), (1, 0), (1, 1)]


def test_a_warp_timeline_draws_each_span_and_adds_up_what_is_busy() -> None:
    ax = viz.plot_warp_timeline([0, 0, 1], [0, 4, 2], [4, 10, 7], [1, 0, 1], rows=["warp 0", "warp 1"], kinds=["wait", "math"])
    drawn = {c.get_zorder(): [p.get_extents() for p in c.get_paths()] for c in ax.collections}
    assert [(b.x0, b.x1) for b in drawn[2]] == [(0, 4), (2, 7)] and [(b.x0, b.x1) for b in drawn[1]] == [(4, 10)]
    assert drawn[1][0].height < drawn[2][0].height
    assert [t for t in texts(ax) if t.endswith("%")] == ["40 %", "50 %"]


def test_memory_occupancy_adds_up_what_is_held() -> None:
    axs = viz.plot_memory_occupancy([0, 2], [2, 6], [1, 3], [5, 9], [0, 1], kinds=["TMA", "threads"], extent=8, time="steps")
    x, y = axs[0].lines[0].get_data()
    assert list(zip(np.asarray(x), np.asarray(y), strict=True)) == [(1, 2), (3, 6), (5, 4), (9, 0)]
    assert axs[0].get_title(loc="left") == "most held: 6 of 8 KiB" or axs[0].get_title() == "most held: 6 of 8 KiB"
    boxes = [p.get_extents() for c in axs[1].collections for p in c.get_paths() if len(p.vertices) > 2]
    assert {(b.x0, b.x1, b.y0, b.y1) for b in boxes} >= {(1, 5, 0, 2), (3, 9, 2, 6)}


def test_bank_conflicts_count_words_a_phase() -> None:
    words = np.zeros((2, 32), int)
    words[0, :8], words[1] = 16, 4
    axs = viz.plot_bank_conflicts(words, [16, 4], [4, 4], ["a", "b"])
    shown = np.ma.filled(axs[0].images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown[0, :8], 4.0)
    assert np.isnan(shown[0, 8:]).all() and (shown[1] == 1).all()
    assert [p.get_width() for p in axs[1].patches] == [4.0, 1.0] and texts(axs[1]) == ["16 of 4", "4"]


def test_traffic_says_how_often_each_byte_moves() -> None:
    ax = viz.plot_traffic({"TMA": [6.0, 0.0], "threads": [0.0, 3.0]}, [2.0, 3.0], ["a", "c"])
    assert [t.split(", ")[1] for t in texts(ax)] == ["3x", "1x"]


def test_resources_beyond_their_limit_stand_out() -> None:
    ax = viz.plot_resources([100, 8, 0], [200, 0, 0], ["registers", "spills", "stack"])
    bars = ax.patches[3:]
    assert [b.get_width() for b in bars] == [0.5, 1.0, 0.0]
    assert bars[1].get_facecolor() != bars[0].get_facecolor() and texts(ax) == ["100 of 200", "8", "0"]


def test_a_barrier_graph_writes_counts_and_marks_open_ends() -> None:
    ax = viz.plot_barrier_graph([("load", "full", 8)], [("full", "math", 32), ("empty", "load", 3)])
    assert {"8", "32", "3"} <= set(texts(ax))
    assert sum(p.get_linestyle() in ("--", "dashed") for p in ax.patches) == 1  # nobody arrives at "empty"


def test_draws_are_ranked_by_probability_and_counted() -> None:
    (ax,) = viz.plot_draws({"fair": (np.array([0.2, 0.0, 0.5, 0.3]), np.array([40, 0, 30, 30]))})
    line, dots, _ = ax.lines
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.3, 0.2])
    np.testing.assert_allclose(dots.get_ydata(), [0.3, 0.3, 0.4])
    assert ax.get_title() == "fair: 33 % of 3 within"  # 0.3 of 0.3 is, 0.3 of 0.5 and 0.4 of 0.2 are not


def test_margins_are_shares_below_a_size() -> None:
    ax = viz.plot_margins({"a": np.array([0.0, 0.1, 1.0, 0.01])}, bounds={"error": 0.05})
    steps = ax.lines[0]
    np.testing.assert_allclose(steps.get_xdata(), [0.01, 0.1, 1.0])
    np.testing.assert_allclose(steps.get_ydata(), [50, 75, 100])
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["a, 1 of zero", "error: 0.05"]
    with pytest.raises(ValueError, match="above zero"):
        viz.plot_margins(np.zeros(3))
    with pytest.raises(ValueError, match=r"bounds\['b'\] must be > 0"):
        viz.plot_margins(np.ones(3), bounds={"b": 0.0})


def test_a_permutation_draws_an_entry_above_and_in_its_row() -> None:
    ax = viz.plot_permutation(np.array([[2, 0], [9, 2]]), np.array([1, 0, -1, 2]), np.array([[0, 0, 1, 0], [2, 1, 3, 1]]))
    boxes = {(round(p.get_x() - 0.04), p.get_y() > 1): p.get_facecolor() for p in ax.patches}
    assert len(boxes) == 7 and (3, True) not in boxes  # four above, three below: one is dropped
    assert boxes[0, False] == boxes[1, True] == boxes[3, False] == boxes[2, True] != boxes[0, True]
    assert [t for t in texts(ax) if not t.startswith("tile")] == ["0", "0", "0", "0", "1", "1", "1", "0", "1"]
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["expert 0", "expert 2", "dropped"]
    with pytest.raises(ValueError, match="tiles must have columns"):
        viz.plot_permutation(np.array([[0]]), np.array([0]), np.array([[0, 0]]))


def test_record_words_stand_bank_by_bank() -> None:
    group = np.array([0] * 32 + [1, -1])
    ax = viz.plot_record_words(group, ["w"] * 33 + [""], ["rows 0, 8", "rows 1, 9"], title="words")
    places = [(p.get_x(), p.get_y()) for p in ax.patches]
    assert places[31:] == [(31, 0), (0, 1), (1, 1)]
    assert ax.patches[0].get_facecolor() != ax.patches[32].get_facecolor() != ax.patches[33].get_facecolor()
    assert len(texts(ax)) == 33
    with pytest.raises(ValueError, match="groups must be 1 to 8 names, got 9"):
        viz.plot_record_words(group, [""] * 34, ["x"] * 9)


def test_word_bits_begin_with_bit_31() -> None:
    code, bit = np.full((1, 32), -1), np.full((1, 32), -1)
    code[0, [31, 0]], bit[0, [31, 0]] = [1, 0], [3, 0]
    ax = viz.plot_word_bits(code, bit, ["word"], codes=["first", "second"])
    where = {t.get_text(): t.get_position()[0] for t in ax.texts[:2]}
    assert where == {"m": 31.5, "s": 0.5}
    assert [t.get_text() for t in ax.get_xticklabels()][:2] == ["31", "27"]
    with pytest.raises(ValueError, match="code must lie in"):
        viz.plot_word_bits(code + 9, bit, ["word"])


def test_a_frequency_is_drawn_as_the_tokens_of_a_turn() -> None:
    ax = viz.plot_frequency_tables({"a": np.array([2 * np.pi, np.pi / 50])}, marks={"window": 128.0})
    np.testing.assert_allclose(line(ax, "a"), [1, 100])
    assert texts(ax) == ["window"]


def test_an_arrow_ends_at_its_pair() -> None:
    axs = viz.plot_pair_planes({"a": np.array([[3.0, 4.0], [1.0, 0.0]]), "b": np.array([[0.0, 5.0], [0.0, -1.0]])}, ["p", "q"])
    tips = [[(float(a.get_xdata()[1]), float(a.get_ydata()[1])) for a in ax.lines] for ax in axs]
    assert tips == [[(3, 4), (0, 5)], [(1, 0), (0, -1)]]
    assert axs[0].patches[0].get_radius() == 5 and axs[0].get_title() == "p"


def test_errors_of_zero_are_counted_and_the_bound_follows_positions() -> None:
    ax = viz.plot_growing_error(np.array([4, 1, 2]), {"a": np.array([0.0, 1.0, 2.0])}, bound=np.array([8.0, 2.0, 4.0]))
    np.testing.assert_allclose(line(ax, "a, 1 of zero"), [1, 2])
    np.testing.assert_allclose(line(ax, "bound"), [2, 4, 8])


def test_fields_follow_each_other_and_keep_their_colour() -> None:
    ax = viz.plot_record_bytes({"x": [("codes", 6), ("scales", 2)], "y": [("scales", 3), ("padding", 1)]})
    boxes = [(p.get_x(), p.get_width()) for p in ax.patches]
    assert boxes == [(0, 6), (6, 2), (0, 3), (3, 1)]
    colors = [p.get_facecolor() for p in ax.patches]
    assert colors[1] == colors[2] != colors[0]
    assert texts(ax) == ["6", "2", "8 B", "3", "1", "4 B"]
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["codes", "scales", "padding"]


def test_dims_have_a_dot_each_and_groups_their_root_mean_square() -> None:
    ax = viz.plot_dim_errors({"a": np.array([3.0, 4.0, 0.0, 2.0])}, split=2, group=3)
    assert [int(np.isnan(ax.lines[0].get_ydata()).sum())] == [1]
    np.testing.assert_allclose(ax.patches[0].get_data().values, [12.5**0.5, np.nan, 2.0])
    assert ax.lines[1].get_xdata()[0] == 1.5


def test_cache_growth_writes_the_last_size() -> None:
    ax = viz.plot_cache_growth([1, 2], {"a": np.array([5e3, 4.05e9])}, marks={"card": 8e10})
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["a: 4.05 GB"]
    assert texts(ax) == ["card: 80 GB"]


def test_gates_show_tokens_as_rows_and_their_mean() -> None:
    weights = np.array([[0.25, 0.75], [0.75, 0.25], [0.0, 0.0]])
    axs = viz.plot_gates(weights, tokens=["a", "b", "c"], cuts=[2])
    np.testing.assert_allclose(axs[0].images[0].get_array(), weights)
    np.testing.assert_allclose([p.get_width() for p in axs[1].patches], [0.5, 0.5, 0.0])
    assert axs[0].lines[0].get_ydata()[0] == 1.5 and axs[1].lines[0].get_xdata()[0] == pytest.approx(1 / 3)


def test_online_softmax_writes_by_what_the_sum_was_scaled() -> None:
    axs = viz.plot_online_softmax(np.arange(5.0), [1.0, 3.0, 3.0], [0.25, 0.5, 0.75], tile=2, sink=2.0)
    assert texts(axs[1]) == ["kept", "x 0.25", "kept"]
    np.testing.assert_allclose([p.get_height() for p in axs[1].patches], [0.25, 0.5, 0.75])
    np.testing.assert_allclose([p.get_width() for p in axs[1].patches], [2, 2, 1])
    np.testing.assert_allclose(line(axs[0], "sink"), [2, 2])


def test_a_spectrum_shows_what_each_rank_leaves_out() -> None:
    ax = viz.plot_spectrum({"a": np.array([2.0, 1.0, 1.0])}, marks={"one": 1})
    np.testing.assert_allclose(line(ax, "a"), [1, 1 / 3, 1 / 6, 1e-6], rtol=1e-9)
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["a: 33 %"] and texts(ax) == ["one"]


def test_launches_lie_end_to_end() -> None:
    ax = viz.plot_launches([1.0, 2.0, 1.0], ["a", "b", "a"])
    np.testing.assert_allclose([p.get_x() for p in ax.patches], [0, 1, 3])
    assert ax.patches[0].get_facecolor() == ax.patches[2].get_facecolor() != ax.patches[1].get_facecolor()
    assert texts(ax) == ["25 %", "50 %", "25 %"]


def test_shares_show_median_and_mean_of_each_way() -> None:
    values = np.array([0.0, 0.1, 0.2, 0.3, 1.0])
    ax = viz.plot_shares({"a": values, "b": np.full(3, 0.5)}, mark=("bar", 0.9))
    medians = [a.get_xdata()[0] for a in ax.lines if a.get_marker() == "o"]
    np.testing.assert_allclose(medians, [0.2, 0.5])
    assert texts(ax) == ["0.320", "0.500", "mean"]
    bar = ax.patches[0]
    np.testing.assert_allclose([bar.get_x(), bar.get_x() + bar.get_width()], [0.1, 0.3])
    np.testing.assert_allclose(line(ax, "bar"), [0, 1])


def test_pooling_colours_what_is_read() -> None:
    ax = viz.plot_pooling(np.array([[1, 0, 2]]), ["first", "second", "never"], title="CSA")
    np.testing.assert_array_equal(ax.images[0].get_array(), [[1, 0, 2]])
    shown = ax.images[0].to_rgba(np.array([0, 1, 2]))
    legend = ax.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["first", "second"]
    assert [p.get_facecolor() for p in legend.get_patches()] == [tuple(c) for c in shown[1:]]
