"""Figures: `plot_x(data, *, ax=None)` takes arrays and returns Axes. Knows numbers and units, nothing of kernels or models.

Every function takes numpy arrays or whatever numpy converts (torch CPU tensors of a dtype numpy has); multi-panel ones take
`axs` and return an array of Axes. `use_style()` applies the one style sheet.
"""

from dsv4lab.viz.attention import plot_attention
from dsv4lab.viz.bank_conflicts import plot_bank_conflicts
from dsv4lab.viz.barrier_graph import plot_barrier_graph
from dsv4lab.viz.cache_growth import plot_cache_growth
from dsv4lab.viz.cache_pages import plot_cache_pages
from dsv4lab.viz.code_histogram import plot_code_histogram
from dsv4lab.viz.cosine_depth import plot_cosine_depth
from dsv4lab.viz.dim_errors import plot_dim_errors
from dsv4lab.viz.draws import plot_draws
from dsv4lab.viz.error_anatomy import plot_error_anatomy
from dsv4lab.viz.error_histogram import plot_error_histogram
from dsv4lab.viz.expert_load import plot_expert_load
from dsv4lab.viz.frequency_tables import plot_frequency_tables
from dsv4lab.viz.gates import plot_gates
from dsv4lab.viz.growing_error import plot_growing_error
from dsv4lab.viz.index_scores import plot_index_scores
from dsv4lab.viz.launches import plot_launches
from dsv4lab.viz.margins import plot_margins
from dsv4lab.viz.memory_occupancy import plot_memory_occupancy
from dsv4lab.viz.mhc_mixing import plot_mhc_mixing
from dsv4lab.viz.mhc_weights import plot_mhc_weights
from dsv4lab.viz.mtp_acceptance import plot_mtp_acceptance
from dsv4lab.viz.number_grid import plot_number_grid
from dsv4lab.viz.online_softmax import plot_online_softmax
from dsv4lab.viz.pair_planes import plot_pair_planes
from dsv4lab.viz.permutation import plot_permutation
from dsv4lab.viz.perplexity import plot_perplexity
from dsv4lab.viz.pooling import plot_pooling
from dsv4lab.viz.predicted import plot_predicted
from dsv4lab.viz.record_bytes import plot_record_bytes
from dsv4lab.viz.record_words import plot_record_words
from dsv4lab.viz.resources import plot_resources
from dsv4lab.viz.roofline import plot_roofline
from dsv4lab.viz.scale_histogram import plot_scale_histogram
from dsv4lab.viz.scale_layout import plot_scale_layout
from dsv4lab.viz.scale_words import plot_scale_words
from dsv4lab.viz.shape_tour import plot_shape_tour
from dsv4lab.viz.shares import plot_shares
from dsv4lab.viz.sinkhorn import plot_sinkhorn
from dsv4lab.viz.spectrum import plot_spectrum
from dsv4lab.viz.stream_norms import plot_stream_norms
from dsv4lab.viz.style import STYLE_PATH, style_context, use_style
from dsv4lab.viz.swizzle import plot_swizzle
from dsv4lab.viz.tmem_map import plot_tmem_map
from dsv4lab.viz.traffic import plot_traffic
from dsv4lab.viz.training_curve import plot_training_curve
from dsv4lab.viz.warp_timeline import plot_warp_timeline
from dsv4lab.viz.window_ring import plot_window_ring
from dsv4lab.viz.word_bits import plot_word_bits

__all__ = [
    "STYLE_PATH",
    "plot_attention",
    "plot_bank_conflicts",
    "plot_barrier_graph",
    "plot_cache_growth",
    "plot_cache_pages",
    "plot_code_histogram",
    "plot_cosine_depth",
    "plot_dim_errors",
    "plot_draws",
    "plot_error_anatomy",
    "plot_error_histogram",
    "plot_expert_load",
    "plot_frequency_tables",
    "plot_gates",
    "plot_growing_error",
    "plot_index_scores",
    "plot_launches",
    "plot_margins",
    "plot_memory_occupancy",
    "plot_mhc_mixing",
    "plot_mhc_weights",
    "plot_mtp_acceptance",
    "plot_number_grid",
    "plot_online_softmax",
    "plot_pair_planes",
    "plot_permutation",
    "plot_perplexity",
    "plot_pooling",
    "plot_predicted",
    "plot_record_bytes",
    "plot_record_words",
    "plot_resources",
    "plot_roofline",
    "plot_scale_histogram",
    "plot_scale_layout",
    "plot_scale_words",
    "plot_shape_tour",
    "plot_shares",
    "plot_sinkhorn",
    "plot_spectrum",
    "plot_stream_norms",
    "plot_swizzle",
    "plot_tmem_map",
    "plot_traffic",
    "plot_training_curve",
    "plot_warp_timeline",
    "plot_window_ring",
    "plot_word_bits",
    "style_context",
    "use_style",
]
