"""Every figure: returns Axes with labels, leaves its inputs alone, clips no text, takes torch tensors, refuses wrong shapes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

from dsv4lab import viz

Case = tuple[Callable[..., Any], list[Any], dict[str, Any]]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits)
    return grown / grown.sum(axis=-1, keepdims=True)


def cases() -> dict[str, Case]:
    """Fresh random data for every figure, odd sizes."""
    rng = np.random.default_rng(7)
    weights = softmax(rng.normal(size=(3, 9, 31 + 13 + 1))).astype(np.float32)
    selected = np.stack([rng.choice(13, 5, replace=False) for _ in range(9)])
    selected[:2, 3:] = -1
    scores = rng.normal(size=(17, 23))
    scores[:, 21:] = -np.inf
    steps = softmax(rng.normal(size=(6, 11, 4, 4)))
    tables = np.array([[3, 0, -1], [5, -1, -1]])
    noisy = 1 - rng.uniform(1e-6, 1e-2, (5, 19))
    values = rng.normal(size=3001) * 8
    tokens = np.arange(1, 301) * 512
    trunk = [("embedding", (1, 7, 96), "rows of the table"), ("layer 0", (1, 7, 4, 96), "SWA"), ("logits", "(1, 7, V)", "head")]
    return {
        "attention": (
            viz.plot_attention,
            [weights[..., :31], weights[..., 31:44], weights[..., 44]],
            {"query_start": 50, "key_start": 28, "tokens_per_entry": 4, "selected": selected},
        ),
        "index_scores": (
            viz.plot_index_scores,
            [scores],
            {"selected": selected[[0] * 17], "visible": np.full(17, 21), "query_start": 80},
        ),
        "expert_load": (viz.plot_expert_load, [rng.integers(1, 99, (3, 7))], {"layer_names": ["a", "b", "c"]}),
        "mhc_mixing": (viz.plot_mhc_mixing, [softmax(rng.normal(size=(7, 4, 4)))], {"columns": 5}),
        "mhc_weights": (viz.plot_mhc_weights, [rng.uniform(0, 1, (5, 9, 4)), rng.uniform(0, 2, (5, 9, 4))], {}),
        "stream_norms": (viz.plot_stream_norms, [rng.uniform(0.1, 9, (6, 13, 4))], {}),
        "sinkhorn": (viz.plot_sinkhorn, [steps], {"tolerance": 1e-4}),
        "cosine_depth": (viz.plot_cosine_depth, [{"official": noisy, "NVFP4": noisy**2}], {"bar": 0.95}),
        "error_histogram": (viz.plot_error_histogram, [{"a": rng.normal(size=(31, 9)), "b": np.zeros(7)}], {}),
        "code_histogram": (viz.plot_code_histogram, [rng.integers(0, 16, (5, 77)), E2M1], {}),
        "scale_histogram": (viz.plot_scale_histogram, [np.exp2(rng.normal(0, 3, 511))], {"marks": {"max": 448.0}}),
        "number_grid": (viz.plot_number_grid, [{"E2M1": E2M1, "twice": 2 * E2M1}], {"limits": (-9.0, 9.0)}),
        "error_anatomy": (viz.plot_error_anatomy, [values, {"int": np.rint(values)}], {"num_bins": 31}),
        "cache_pages": (viz.plot_cache_pages, [tables, np.array([201, 5])], {"num_pages": 7, "page_tokens": 128}),
        "window_ring": (viz.plot_window_ring, [np.array([[8, 9, 3, -1, 4], [5, 6, 2, 3, 4]])], {}),
        "roofline": (
            viz.plot_roofline,
            [np.array([1.0, 300.0, 310.0]), np.array([2.0, 500.0, 520.0]), ["norm", "gemm", "experts"]],
            {"bandwidth": 4.8, "ceilings": {"BF16": 989.0, "FP8": 1979.0}, "ceiling_of": ["BF16", "BF16", "FP8"]},
        ),
        "training_curve": (
            viz.plot_training_curve,
            [tokens, 3 + rng.normal(size=300)],
            {"held_out": (tokens[::50], np.full(6, 3.0))},
        ),
        "perplexity": (
            viz.plot_perplexity,
            [{"BF16": 6.0, "NVFP4": 6.12}, "BF16"],
            {"limits": {"NVFP4": 0.03}, "spread": {"NVFP4": 0.02}},
        ),
        "predicted": (
            viz.plot_predicted,
            [{"NVFP4 rows": 0.095, "BF16": 0.0016}, {"NVFP4 rows": 0.097, "BF16": 0.002}],
            {"quantity": "relative RMS error (no unit)", "spread": {"BF16": 1e-4}, "bounds": {"NVFP4 rows": 0.18}},
        ),
        "scale_layout": (
            viz.plot_scale_layout,
            [{"linear": np.arange(33 * 7).reshape(33, 7), "shuffled": rng.permutation(33 * 7).reshape(33, 7)}],
            {"num_marked": 9},
        ),
        "mtp_acceptance": (viz.plot_mtp_acceptance, [np.array([50, 20]), np.array([100, 50])], {"bar": 0.5}),
        "warp_timeline": (
            viz.plot_warp_timeline,
            [np.array([0, 0, 1, 2, 2]), np.array([0.0, 5, 2, 0, 9]), np.array([5.0, 9, 3, 8, 9.5]), np.array([1, 0, 2, 3, 3])],
            {
                "rows": ["warp 0", "warp 1", "TMA"],
                "kinds": ["wait", "math", "mma", "load"],
                "groups": ["CTA 0"] * 2 + ["CTA 1"],
            },
        ),
        "memory_occupancy": (
            viz.plot_memory_occupancy,
            [np.array([0.0, 4, 0]), np.array([4.0, 8, 2]), np.array([1, 3, 30]), np.array([20, 3, 44]), np.array([0, 1, 1])],
            {"kinds": ["TMA", "threads"], "extent": 12.0},
        ),
        "bank_conflicts": (
            viz.plot_bank_conflicts,
            [rng.integers(0, 9, (3, 32)), np.array([40, 8, 8]), np.array([8, 8, 8])],
            {"labels": ["copy.py:86  ld.v4.b32", "copy.py:88  st.v4.b32", "copy.py:90  ld.b32"]},
        ),
        "traffic": (
            viz.plot_traffic,
            [{"TMA": np.array([96.0, 48, 0]), "threads": np.array([0.0, 0, 64])}, np.array([32.0, 48, 64])],
            {"labels": ["a, read", "b, read", "c, written"]},
        ),
        "resources": (
            viz.plot_resources,
            [np.array([168.0, 84, 96000]), np.array([255.0, 0, 232448])],
            {"labels": ["registers of a thread", "spilled bytes", "shared memory (bytes)"]},
        ),
        "barrier_graph": (
            viz.plot_barrier_graph,
            [
                [("warp 0 (load)\ncopy.py:64", "mbarrier +0", 8), ("TMA load\ncopy.py:65", "mbarrier +0", 8)],
                [("mbarrier +0", "warps 1-4 (math)\ncopy.py:83", 32), ("mbarrier +8", "warp 0 (load)\ncopy.py:62", 1)],
            ],
            {},
        ),
        "margins": (viz.plot_margins, [rng.uniform(0, 1, 61)], {"bounds": {"error of two scores": 0.02}}),
        "permutation": (
            viz.plot_permutation,
            [np.array([[2, 0], [1, 9], [2, 2]]), np.array([2, 0, 1, -1, 3, 4]), np.array([[0, 0, 1], [1, 1, 2], [2, 2, 5]])],
            {},
        ),
        "record_words": (
            viz.plot_record_words,
            [np.arange(45) % 9 - 1],
            {"texts": [f"{i}\n{i}" for i in range(45)], "groups": [f"rows {i}" for i in range(8)], "title": "words"},
        ),
        "word_bits": (
            viz.plot_word_bits,
            [np.arange(64).reshape(2, 32) // 8 - 1, np.arange(64).reshape(2, 32) % 4],
            {"rows": ["stored", "shifted"], "codes": [f"row {i}, column 3" for i in range(7)]},
        ),
        "scale_words": (
            viz.plot_scale_words,
            [
                np.arange(32)[:, None, None] + 32 * np.arange(3)[:, None] + np.zeros(4, int),
                np.zeros((32, 3, 1), int) + np.array([0, 0, 1])[:, None] * 4 + np.arange(4),
            ],
            {"first_column": 48},
        ),
        "swizzle": (
            viz.plot_swizzle,
            [np.array([[0, 1, 2], [1, 0, -1], [2, 1, 0]])],
            {"marked": np.array([[True, False, True], [False, True, True], [True, True, False]])},
        ),
        "tmem_map": (
            viz.plot_tmem_map,
            [np.where(np.arange(61) < 30, 0, np.where(np.arange(61) < 34, 1, -1)) + np.zeros((64, 1), int), ["sums", "scales"]],
            {},
        ),
        "frequency_tables": (
            viz.plot_frequency_tables,
            [{"window": 10.0 ** -np.linspace(0, 4, 32), "entries": 10.0 ** -np.linspace(0, 6, 32)}],
            {"ramp": (15, 25), "marks": {"window": 128.0}},
        ),
        "pair_planes": (
            viz.plot_pair_planes,
            [{"before": rng.normal(size=(3, 2)), "after": rng.normal(size=(3, 2))}],
            {"titles": ["pair 0", "pair 1", "pair 31"]},
        ),
        "growing_error": (
            viz.plot_growing_error,
            [np.arange(1, 62), {"float32": rng.uniform(0, 1, 61), "none": np.zeros(61)}],
            {"bound": np.linspace(1, 2, 61), "quantity": "error (rad)"},
        ),
        "record_bytes": (
            viz.plot_record_bytes,
            [{"fp8": [("codes", 448), ("rotary", 128), ("padding", 8)], "nvfp4": [("codes", 224), ("rotary", 128)]}],
            {},
        ),
        "dim_errors": (
            viz.plot_dim_errors,
            [{"fp8": rng.uniform(0.01, 0.1, 77), "bf16": np.r_[np.zeros(50), rng.uniform(1e-4, 1e-3, 27)]}],
            {"split": 50, "words": ("not rotary", "rotary")},
        ),
        "cache_growth": (
            viz.plot_cache_growth,
            [np.array([128, 1024, 65536]), {"fp8": np.array([3e6, 9e6, 4e9]), "plain": np.array([5e6, 1e7, 8e9])}],
            {"marks": {"one H100": 80e9}},
        ),
        "gates": (
            viz.plot_gates,
            [softmax(rng.normal(size=(33, 8))).T],
            {"tokens": [f"token {i}" for i in range(8)], "cuts": [4], "title": "entry 3"},
        ),
        "online_softmax": (
            viz.plot_online_softmax,
            [rng.normal(size=70), np.array([1.0, 1.0, 2.5]), np.array([0.2, 0.5, 0.9])],
            {"tile": 32, "sink": 0.5},
        ),
        "launches": (viz.plot_launches, [rng.uniform(1, 9, 5), ["norm", "linear", "norm", "attention", "linear"]], {}),
        "spectrum": (
            viz.plot_spectrum,
            [{"weights": np.sort(rng.uniform(0.1, 1, 12))[::-1].copy(), "outputs": 2.0 ** -np.arange(9.0)}],
            {"marks": {"half": 6}},
        ),
        "draws": (
            viz.plot_draws,
            [{f"case {i}": (np.r_[softmax(rng.normal(size=30)), 0], np.r_[rng.integers(0, 90, 30), 0]) for i in range(3)}],
            {},
        ),
        "shares": (
            viz.plot_shares,
            [{"one way": rng.uniform(0.2, 0.9, 31), "another": rng.uniform(0.5, 1.0, 7)}],
            {"quantity": "share kept", "mark": ("all", 1.0)},
        ),
        "pooling": (viz.plot_pooling, [np.eye(3, 21, dtype=int) * 2], {"kinds": ["first half", "second half"], "title": "CSA"}),
        "shape_tour": (
            viz.plot_shape_tour,
            [trunk],
            {"branch": [("MTP block", (1, 7, 4, 96), "SWA")], "branch_from": "layer 0", "kinds": ["in", "layer", "out"]},
        ),
    }


NAMES = sorted(cases())
# the first argument is no array, or a tiny one with names beside it
MAPS_ONLY = {"barrier_graph", "shape_tour", "perplexity", "predicted", "record_bytes", "roofline", "traffic"}
DIAGRAMS = {"barrier_graph", "shape_tour"}  # no scale, no axis


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    with viz.style_context():
        yield
    plt.close("all")


def convert(value: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """`change` applied to every array within nested containers."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, dict):
        return {k: convert(v, change) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(convert(v, change) for v in value)
    return value


def draw(case: Case) -> tuple[list[Axes], np.ndarray]:
    """The Axes that came back, and the pixels of their figure."""
    function, args, kwargs = case
    got = function(*args, **kwargs)
    axs = list(np.atleast_1d(np.asarray(got, dtype=object)))
    figure = axs[0].get_figure(root=True)
    figure.canvas.draw()
    return axs, np.asarray(figure.canvas.buffer_rgba()).copy()


def test_every_public_figure_is_tested_here() -> None:
    public = {name.removeprefix("plot_") for name in viz.__all__ if name.startswith("plot_")}
    assert public == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_returns_labelled_axes_and_closes(name: str) -> None:
    axs, _ = draw(cases()[name])
    assert all(isinstance(ax, Axes) for ax in axs)
    if name not in DIAGRAMS:
        figure = axs[0].get_figure(root=True)
        assert any(ax.get_xlabel() for ax in axs) and axs[0].get_ylabel()
        assert all(ax.get_xlabel() or ax.get_shared_x_axes().get_siblings(ax)[1:] for ax in axs)
        assert all(ax.get_ylabel() or ax.get_xlabel() for ax in figure.axes if ax not in axs and ax.get_visible())
    assert len(plt.get_fignums()) == 1
    plt.close(axs[0].get_figure(root=True))
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name: str) -> None:
    case = cases()[name]
    before = copy.deepcopy(case[1:])
    draw(case)
    np.testing.assert_equal(case[1:], before)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_leaves_the_figure(name: str) -> None:
    axs, _ = draw(cases()[name])
    figure = axs[0].get_figure(root=True)
    page = figure.bbox
    for ax in figure.axes:
        texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label, ax.title, *ax.texts]
        legend = ax.get_legend()
        texts += legend.get_texts() if legend else []
        for text in texts:
            if ax.get_visible() and text.get_text() and _shown(text, ax):
                box = text.get_window_extent()
                inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
                assert inside, f"{text.get_text()!r} at {box} leaves {page}"


def _shown(text: Text, ax: Axes) -> bool:
    """Whether a text is drawn: tick labels beyond the limits and those of shared axes are not."""
    if text in ax.texts or text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        return text.get_visible() and ax.axison
    legend = ax.get_legend()
    if legend is not None and text in legend.get_texts():
        return True
    ticks = [*ax.xaxis.get_ticklabels(), *ax.yaxis.get_ticklabels()]
    x, y = text.get_position()
    within = ax.get_window_extent().padded(2)
    at = text.get_transform().transform((x, y))
    return (
        ax.axison
        and text.get_visible()
        and text in ticks
        and (within.x0 <= at[0] <= within.x1 or within.y0 <= at[1] <= within.y1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_draws_on_given_axes(name: str) -> None:
    function, args, kwargs = cases()[name]
    multi = "axs" in inspect.signature(function).parameters
    count = len(function(*args, **kwargs)) if multi else 1
    plt.close("all")
    figure, given = plt.subplots(1, count, squeeze=False)
    got = function(*args, **kwargs, axs=given) if multi else function(*args, **kwargs, ax=given[0, 0])
    assert list(np.atleast_1d(np.asarray(got, dtype=object))) == list(given.ravel())
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"barrier_graph", "shape_tour", "perplexity"}))
def test_torch_tensors_draw_the_same_picture(name: str) -> None:
    torch = pytest.importorskip("torch")
    function, args, kwargs = cases()[name]
    _, plain = draw((function, args, kwargs))
    plt.close("all")
    change = lambda a: torch.from_numpy(a.copy())  # noqa: E731
    _, tensors = draw((function, convert(args, change), convert(kwargs, change)))
    assert np.array_equal(plain, tensors)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(NAMES) - MAPS_ONLY - {"code_histogram", "cache_pages", "window_ring", "mtp_acceptance", "warp_timeline", "pooling"}
    ),
)
def test_bfloat16_and_grad_tensors_are_refused(name: str) -> None:
    torch = pytest.importorskip("torch")
    function, args, kwargs = cases()[name]
    for change in (lambda a: torch.tensor(a).bfloat16(), lambda a: torch.tensor(a, dtype=torch.float32, requires_grad=True)):
        with pytest.raises(
            TypeError, match=r"must convert to a numpy array \(detach, move to CPU, cast to float32\), got Tensor"
        ):
            function(*convert(args, change), **kwargs)


def changed(name: str, index: int | str, value: Any) -> Case:
    """The case with one argument replaced."""
    function, args, kwargs = cases()[name]
    if isinstance(index, str):
        return function, args, {**kwargs, index: value}
    return function, [*args[:index], value, *args[index + 1 :]], kwargs


REFUSED = [
    ("attention", 0, np.full(3, 0.1), r"window must have shape \(S, P\) or \(H, S, P\), got \(3,\)"),
    ("attention", 0, np.full((9, 31), 1.5), r"window must lie in \[0, 1\], got \[1.5, 1.5\]"),
    ("attention", 2, np.full(8, 0.1), r"window, compressed and sink must have the same S, got 9, 9, 8"),
    ("attention", "selected", np.full((9, 2), 13), r"selected must hold indices in \[-1, 13\), got \[13, 13\]"),
    ("attention", "head", 3, r"head must be in \[0, 3\) for window, got 3"),
    ("attention", "tokens_per_entry", 0, r"tokens_per_entry must be > 0 and finite, got 0"),
    ("index_scores", 0, np.zeros(5), r"scores must have shape \(S, T\), got \(5,\)"),
    ("index_scores", "visible", np.full(16, 3), r"visible must have shape \(17\), got \(16,\)"),
    ("index_scores", "visible", np.full(17, 24), r"visible must lie in \[0, 23\], got \[24, 24\]"),
    ("index_scores", "selected", np.ones((17, 5), bool), r"selected must have shape \(17, 23\), got \(17, 5\)"),
    ("expert_load", 0, np.zeros((3, 4)), r"counts must have a token in every layer, got none in layer 0"),
    ("expert_load", 0, -np.ones((3, 4)), r"counts must lie in \[0, inf\], got \[-1, -1\]"),
    ("expert_load", "layer_names", ["a"], r"layer_names must have 3 entries, got 1"),
    ("mhc_mixing", 0, np.zeros((2, 4, 3)), r"comb must hold square matrices, got 4 x 3"),
    ("mhc_mixing", 0, np.zeros((49, 4, 4)), r"comb must have at most 48 sites \(choose some layers\), got 49"),
    ("mhc_weights", 1, np.zeros((5, 4)), r"post must have the shape of pre \(5, 9, 4\), got \(5, 4\)"),
    ("stream_norms", 0, np.zeros((0, 4)), r"rms must not be empty, got shape \(0, 4\)"),
    ("stream_norms", 0, np.array([[-1.0]]), r"rms must lie in \[0, inf\], got \[-1, -1\]"),
    ("sinkhorn", 0, np.zeros((3, 4, 4)), r"steps must have shape \(I, T, N, N\), got \(3, 4, 4\)"),
    ("sinkhorn", 0, np.full((1, 1, 2, 2), np.nan), r"steps must be finite, got 4 NaN or infinite of 4 values"),
    ("cosine_depth", 0, {"a": np.ones(3), "b": np.ones(4)}, r"same number of layers in every series, got \[3, 4\]"),
    ("cosine_depth", 0, {"a": np.full(3, 1.1)}, r"cosines\['a'\] must lie in \[-1, 1\], got \[1.1, 1.1\]"),
    ("cosine_depth", "bar", 1.0, r"bar must be in \[-1, 1\), got 1.0"),
    ("error_histogram", 0, np.array([np.inf]), r"errors must be finite, got 1 NaN or infinite of 1 values"),
    ("error_histogram", "quantiles", (2.0,), r"quantiles must lie in \[0, 1\], got \(2.0,\)"),
    ("code_histogram", 0, np.array([16]), r"codes must lie in \[0, 15\], got \[16, 16\]"),
    ("scale_histogram", 0, np.array([-1.0]), r"scales must lie in \[0, inf\], got \[-1, -1\]"),
    ("scale_histogram", "marks", {"low": 0.0}, r"marks\['low'\] must be > 0 and finite, got 0.0"),
    ("number_grid", 0, {}, r"grids must not be empty, got an empty mapping"),
    ("number_grid", "limits", (7.0, 9.0), r"grids\['E2M1'\] must have a value within limits \(7, 9\), got none"),
    ("error_anatomy", 1, {"x": np.ones(4)}, r"quantized\['x'\] must have shape \(3001\), got \(4,\)"),
    ("cache_pages", 0, np.array([[3, 0], [3, -1]]), r"block_tables must name a page once, got page 3 2 times"),
    ("cache_pages", 0, np.array([[7], [1]]), r"block_tables must lie in \[-1, 6\], got \[1, 7\]"),
    ("cache_pages", 1, np.array([500, 5]), r"block_tables\[0\] must have a page for each of 500 tokens, got 2 of 128"),
    ("window_ring", 0, np.array([-2, 0]), r"positions must lie in \[-1, inf\], got \[-2, 0\]"),
    ("roofline", 1, np.array([1.0, 2.0]), r"rate must have shape \(3\), got \(2,\)"),
    ("roofline", 0, np.array([0.0, 1.0, 2.0]), r"intensity must be > 0, got 0"),
    ("roofline", "ceiling_of", ["BF16", "BF16", "INT8"], r"ceiling_of must name one of \['BF16', 'FP8'\], got 'INT8'"),
    ("training_curve", 1, np.zeros(4), r"loss must have shape \(300\), got \(4,\)"),
    ("training_curve", 0, np.arange(300)[::-1], r"tokens must not fall, got a step of -1"),
    ("training_curve", "held_out", (np.arange(3), np.arange(4)), r"held_out\[1\] must have shape \(3\), got \(4,\)"),
    ("perplexity", 1, "FP8", r"reference must be one of \['BF16', 'NVFP4'\], got 'FP8'"),
    ("perplexity", "limits", {"FP8": 0.1}, r"limits must name formats of perplexity \['BF16', 'NVFP4'\], got 'FP8'"),
    ("predicted", 1, {"BF16": 1.0}, r"predicted and measured must name the same cases, got .*"),
    ("predicted", 1, {"NVFP4 rows": 0.1, "BF16": 0.0}, r"measured must be > 0, got 0"),
    ("scale_layout", 0, {}, r"offsets must not be empty, got an empty mapping"),
    ("scale_layout", 0, {"a": np.zeros((2, 3), int), "b": np.zeros((3, 2), int)}, r"offsets\['b'\] must have shape \(2, 3\)"),
    ("scale_layout", 0, {"a": -np.ones((2, 3), int)}, r"offsets\['a'\] must lie in \[0, inf\], got \[-1, -1\]"),
    ("scale_words", 1, np.zeros((32, 3, 3), int), r"block must have shape \(32, 3, 4\), got \(32, 3, 3\)"),
    ("scale_words", 0, -np.ones((32, 3, 4), int), r"row must lie in \[0, inf\], got \[-1, -1\]"),
    ("swizzle", 0, np.zeros(4, int), r"chunk must have shape \(L, P\), got \(4,\)"),
    ("swizzle", "marked", np.ones((3, 2), bool), r"marked must have shape \(3, 3\), got \(3, 2\)"),
    ("tmem_map", 0, np.full((4, 4), 2), r"owner must lie in \[-1, 1\], got \[2, 2\]"),
    ("mtp_acceptance", 0, np.array([50, 51]), r"accepted must be <= drafted, got 51 of 50 at position 2"),
    ("mtp_acceptance", 1, np.array([100]), r"drafted must have shape \(2\), got \(1,\)"),
    ("warp_timeline", 0, np.array([0, 0, 1, 2, 3]), r"row must lie in \[0, 2\], got \[0, 3\]"),
    ("warp_timeline", 1, np.array([0.0, 5, 4, 0, 9]), r"end must be >= start, got 3 < 4 in span 2"),
    ("warp_timeline", 3, np.array([0, 0]), r"kind must have shape \(5\), got \(2,\)"),
    ("warp_timeline", "groups", ["CTA 0"], r"groups must have 3 entries, got 1"),
    ("memory_occupancy", 1, np.array([4.0, 8, 13]), r"high must lie in \[0, 12\], got \[4, 13\]"),
    ("memory_occupancy", 3, np.array([0, 3, 44]), r"end must be >= start and high >= low in every piece"),
    ("memory_occupancy", "extent", 0.0, r"extent must be > 0 and finite, got 0.0"),
    ("bank_conflicts", 1, np.array([40, 8, 7]), r"passes must be >= phases, got 7 < 8 for copy.py:90  ld.b32"),
    ("bank_conflicts", 2, np.array([8, 8]), r"phases must have shape \(3\), got \(2,\)"),
    ("traffic", 0, {}, r"moved must not be empty, got an empty mapping"),
    ("traffic", 1, np.array([-1.0, 0, 0]), r"least must lie in \[0, inf\], got \[-1, 0\]"),
    ("resources", 1, np.array([255.0]), r"limits must have shape \(3\), got \(1,\)"),
    ("barrier_graph", 0, [("a", "b", 0)], r"arrivals must hold \(from, to, times >= 1\), got \('a', 'b', 0\)"),
    ("frequency_tables", 0, {"a": np.array([1.0, 0.0])}, r"tables\['a'\] must be > 0, got 0"),
    ("frequency_tables", "marks", {"window": -1.0}, r"marks\['window'\] must be > 0 and finite, got -1.0"),
    ("pair_planes", 0, {"a": np.ones((9, 2))}, r"vectors must have at most 8 pairs, got 9"),
    ("pair_planes", 0, {"a": np.ones((3, 2)), "b": np.ones((2, 2))}, r"vectors\['b'\] must have shape \(3, 2\), got \(2, 2\)"),
    ("pair_planes", "titles", ["one"], r"titles must have 3 entries, got 1"),
    ("growing_error", 0, np.arange(61), r"positions must be > 0, got 0"),
    ("growing_error", 1, {"a": -np.ones(61)}, r"errors\['a'\] must lie in \[0, inf\], got \[-1, -1\]"),
    ("growing_error", "bound", np.ones(3), r"bound must have shape \(61\), got \(3,\)"),
    ("record_bytes", 0, {}, r"records must have fields, got {}"),
    ("record_bytes", 0, {"a": [("codes", 0)]}, r"records must have fields of 1 byte or more, got 0"),
    ("record_bytes", 0, {"a": [(str(i), 1) for i in range(8)]}, r"records must have at most 7 fields, got 8"),
    ("dim_errors", "split", 77, r"split must be in \(0, 77\) and group >= 1, got 77 and 16"),
    ("dim_errors", 0, {"a": np.ones(60), "b": np.ones(61)}, r"errors\['b'\] must have shape \(60\), got \(61,\)"),
    ("cache_growth", 1, {"a": np.zeros(3)}, r"sizes\['a'\] must be > 0, got 0"),
    ("cache_growth", 1, {"a": np.ones(4)}, r"sizes\['a'\] must have shape \(3\), got \(4,\)"),
    ("gates", 0, np.full((8, 5), 0.5), r"weights must add up to 1 in every channel, got a sum off by 3"),
    ("gates", "tokens", ["a"], r"tokens must have 8 entries, got 1"),
    ("online_softmax", 1, np.array([1.0, 0.5, 2.0]), r"maxima must not fall, got 1 followed by less"),
    ("online_softmax", 2, np.array([0.1, 0.2]), r"shares must have shape \(3\), got \(2,\)"),
    ("online_softmax", "tile", 0, r"tile must be > 0 and finite, got 0"),
    ("launches", 0, np.zeros(5), r"lengths must not all be zero, got 5 of them"),
    ("launches", 1, ["one"], r"names must have 5 entries, got 1"),
    ("spectrum", 0, {"a": np.array([1.0, 2.0])}, r"values\['a'\] must be singular values, largest first, got 1 first and 2"),
    ("spectrum", "marks", {"none": 0}, r"marks\['none'\] must be > 0 and finite, got 0"),
    ("shares", 0, {"a": np.array([0.5, 1.5])}, r"shares\['a'\] must lie in \[0, 1\], got \[0.5, 1.5\]"),
    ("shares", "quantiles", (0.3, 0.9), r"quantiles must be in \[0, 0.25\] and \[0.75, 1\], got 0.3 and 0.9"),
    ("draws", 0, {}, r"cases must not be empty, got an empty mapping"),
    ("draws", 0, {"a": (np.ones(2) / 2, np.zeros(2, int))}, r"cases\['a'\]\[1\] must hold counts .*, got a sum of 0"),
    ("draws", 0, {"a": (np.array([1.0, 0]), np.array([3, 2]))}, r"cases\['a'\]\[1\] must be 0 where .*, got 2 draws"),
    ("pooling", 0, np.full((2, 3), 3), r"reads must lie in \[0, 2\], got \[3, 3\]"),
    ("pooling", "kinds", [], r"kinds must be 1 to 7 names, got 0"),
    ("shape_tour", 0, [], r"rows must not be empty, got no stage"),
    ("shape_tour", 0, [("a", (1,))], r"rows\[0\] must be \(name, shape, note\), got \('a', \(1,\)\)"),
    ("shape_tour", "branch_from", "nowhere", r"branch_from must be one of .*, got 'nowhere'"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), REFUSED)
def test_wrong_input_is_refused(name: str, index: int | str, value: Any, message: str) -> None:
    function, args, kwargs = changed(name, index, value)
    with pytest.raises(ValueError, match=message):
        function(*args, **kwargs)
    assert plt.get_fignums() == [], "a refused call must leave no figure behind"


def test_wrong_dtypes_and_too_few_axes_are_refused() -> None:
    with pytest.raises(TypeError, match="codes must hold integers, got dtype float64"):
        viz.plot_code_histogram(np.ones(3), E2M1)
    with pytest.raises(TypeError, match="scores must hold real numbers, got dtype complex128"):
        viz.plot_index_scores(np.ones((2, 2), complex))
    with pytest.raises(ValueError, match="axs must hold 2 Axes, got 1"):
        viz.plot_expert_load(np.ones((2, 2)), axs=[plt.figure().subplots()])
