"""Sampling: from logits to token ids, reproducible draw by draw.

The draw is argmax(p / E) with E ~ Exp(1) (spec 15), taken in log space: argmax(logits / T + g), g = -log E. The noise of
vocabulary element v is a pure function of (seed, position, v), so a draw does not depend on the batch it sits in, on the
device, or on how the vocabulary is split between workers.

Noise, exactly:
  word = Philox4x32-10(counter = (v // 4, position low, position high, stream), key = (seed low, seed high))[v % 4]
  w    = float32(2 * word + 1) * 2^-33, at most 1 - 2^-24        uniform on (0, 1), fine near 0
  E    = -log(1 - w),  g = -log(E)                               `_log_of_fraction`, float32 add, multiply and divide
Every step is an integer operation or an IEEE float32 operation rounded to nearest, with no fused multiply-add, so a
kernel can reproduce g bit for bit. Words are uint32 held in int64. Source of the generator: Salmon et al. 2011.
`position` is the index in the sequence of the token being drawn; a seed must not be used twice for one position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4lab.arguments import check_peaks
from dsv4lab.paging import check_range

SAMPLE, ACCEPT, RESIDUAL = 0, 1, 2  # streams: token draws, acceptance of drafts, the token after the accepted drafts

_MIN_TEMPERATURE = 1e-5  # spec 15: logits / max(T, 1e-5)
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440054690583e-4  # their sum is ln 2; HIGH * exponent is exact in float32
_SQRT_HALF_BITS = 0x3F3504F3


# ---- public --------------------------------------------------------------------------------------------------------
def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    seed: Tensor,
    position: Tensor,
    peaks: Tensor | None = None,
) -> Tensor:
    """Draw one token a row.

    logits (B, V) float; temperature (B,) f32, 0 = greedy, lowest id among equal logits; top_k (B,) int, 0 = off;
    top_p (B,) f32, 1 = off; seed, position (B,) int64 -> ids (B,) int64. Filters as in `probabilities`.
    peaks: the logits' own, see `head.lm_head_peaks`; a kernel saves work by them, the result is the same.
    Raises ValueError on shapes, TypeError on dtypes. Logits must not be NaN.
    """
    check_peaks(peaks, logits)
    scaled = _scaled(logits, temperature, top_k, top_p)
    check_vectors(logits.shape[0], seed=seed, position=position)
    keys = scaled + gumbel_noise(seed, position, logits.shape[1])
    return torch.where(temperature <= 0, logits.float().argmax(-1), keys.argmax(-1))


def probabilities(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    peaks: Tensor | None = None,
) -> Tensor:
    """The distribution `sample` draws from: (B, V) f32, rows sum to 1; one-hot where temperature is 0.

    Arguments and errors as `sample`. Order of filters: temperature, top-k, top-p. top-k keeps exactly k elements; top-p
    keeps the shortest run of the rest, by falling probability, whose mass reaches top_p of it, at least one element.
    Of equal logits the lower id ranks first, in both.
    """
    check_peaks(peaks, logits)
    scaled = _scaled(logits, temperature, top_k, top_p)
    greedy = torch.nn.functional.one_hot(logits.float().argmax(-1), logits.shape[1]).float()
    return torch.where((temperature <= 0)[:, None], greedy, scaled.softmax(-1))


def accept_drafts(
    target_probs: Tensor, draft_probs: Tensor, draft_ids: Tensor, *, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Verify n drafted tokens a row by rejection, so that what comes out is distributed as the target alone would have it.

    target_probs (B, n + 1, V) f32: target distribution at each draft and after the last; draft_probs (B, n, V) f32: the
    distributions the drafts were drawn from; draft_ids (B, n) int64; seed (B,) int64; position (B,) int64 of the first
    draft -> num_accepted (B,) int64 in 0..n, next_ids (B,) int64, the token that follows the accepted ones.
    Draft i is accepted when u * q(draft) < p(draft). The first rejected one is replaced by a draw from max(p - q, 0);
    when all are accepted the next token is drawn from the last target row. With one-hot rows (greedy) this is the
    longest prefix equal to the target's own choices. The drafts may have been drawn by `sample` with the same seed and
    positions: the streams differ. Raises ValueError on shapes, TypeError on dtypes.
    """
    if target_probs.ndim != 3 or target_probs.shape[1] < 1:
        raise ValueError(f"target_probs must be (B, n + 1, V), got {tuple(target_probs.shape)}")
    batch, length, vocab = target_probs.shape
    drafts = length - 1
    if tuple(draft_probs.shape) != (batch, drafts, vocab):
        raise ValueError(f"draft_probs must be {(batch, drafts, vocab)} like target_probs, got {tuple(draft_probs.shape)}")
    if tuple(draft_ids.shape) != (batch, drafts):
        raise ValueError(f"draft_ids must be {(batch, drafts)} like target_probs, got {tuple(draft_ids.shape)}")
    for name, tensor in (("target_probs", target_probs), ("draft_probs", draft_probs)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if draft_ids.dtype != torch.int64:
        raise TypeError(f"draft_ids must be int64, got {draft_ids.dtype}")
    check_vectors(batch, seed=seed, position=position)
    check_range("draft_ids", draft_ids, vocab, start=0)

    at = position[:, None] + torch.arange(length, device=position.device)  # (B, n + 1)
    p_draft = target_probs[:, :drafts].gather(-1, draft_ids[..., None]).squeeze(-1)
    q_draft = draft_probs.gather(-1, draft_ids[..., None]).squeeze(-1)
    u = _uniform(_words(seed[:, None], at[:, :drafts], 1, first=0, stream=ACCEPT)).squeeze(-1)
    accepted = (u * q_draft < p_draft).long().cumprod(-1).sum(-1)

    row = accepted[:, None, None].expand(-1, 1, vocab)
    p = target_probs.gather(1, row).squeeze(1)
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], dim=1)  # nothing to subtract after the last draft
    residual = (p - padded.gather(1, row).squeeze(1)).clamp_min(0)
    # p and q that differ by rounding only can leave nothing
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
    here = at.gather(1, accepted[:, None]).squeeze(1)
    return accepted, (weights / exponential_noise(seed, here, vocab, stream=RESIDUAL)).argmax(-1)


def exponential_noise(seed: Tensor, position: Tensor, num_tokens: int, *, first: int = 0, stream: int = SAMPLE) -> Tensor:
    """Exp(1) noise of vocabulary elements first .. first + num_tokens - 1: (..., num_tokens) f32, > 0.

    seed, position (...) int64, of one shape; stream one of SAMPLE, ACCEPT, RESIDUAL.
    """
    return _exponential(_uniform(_words(seed, position, num_tokens, first=first, stream=stream)))


def gumbel_noise(seed: Tensor, position: Tensor, num_tokens: int, *, first: int = 0, stream: int = SAMPLE) -> Tensor:
    """-log of `exponential_noise`: what `sample` adds to logits / T before it takes the largest."""
    return -_log(exponential_noise(seed, position, num_tokens, first=first, stream=stream))


# ---- filters -------------------------------------------------------------------------------------------------------
def _scaled(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """logits / T, -inf where a filter removed the element: (B, V) f32."""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be (B, V) with V >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    check_vectors(logits.shape[0], temperature=temperature, top_k=top_k, top_p=top_p)
    scaled = logits.float() / temperature.clamp_min(_MIN_TEMPERATURE)[:, None]
    if top_k is None and top_p is None:
        return scaled
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)  # stable: equal logits stay in id order
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        rank = torch.arange(logits.shape[1], device=logits.device)
        keep &= (rank < top_k[:, None]) | (top_k <= 0)[:, None]
    if top_p is not None:
        mass = ordered.masked_fill(~keep, -torch.inf).softmax(-1).double()  # float64: 1e5 float32 terms lose 3 digits
        before = mass.cumsum(-1) - mass
        inside = before < top_p[:, None].double() * mass.sum(-1, keepdim=True)
        inside[:, 0] = True
        keep &= inside | (top_p >= 1)[:, None]
    return scaled.masked_fill(~torch.empty_like(keep).scatter_(-1, order, keep), -torch.inf)


def check_vectors(batch: int, **vectors: Tensor | None) -> None:
    """Raises ValueError or TypeError unless each is (batch,), and int64 unless its name is that of a sampling parameter."""
    for name, tensor in vectors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} must be ({batch},), one value a row, got {tuple(tensor.shape)}")
        if name in ("temperature", "top_p"):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {tensor.dtype}")
        elif name == "top_k":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        elif tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tensor.dtype}")


# ---- counter-based noise -------------------------------------------------------------------------------------------
def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, by halves of b: no partial result reaches 2^50."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter and two key words -> four words; int64 tensors that broadcast, values 0 .. 2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(seed: Tensor, position: Tensor, num_tokens: int, *, first: int, stream: int) -> Tensor:
    """One word for each vocabulary element: (..., num_tokens) int64."""
    seed, position = seed[..., None], position[..., None]
    groups = torch.arange(first // 4, (first + num_tokens + 3) // 4, device=position.device)
    low, high = position & _MASK, (position >> 32) & _MASK
    words = philox4x32(
        (groups, low, high, torch.full_like(low, stream)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    flat = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)
    return flat[..., first % 4 : first % 4 + num_tokens]


def _uniform(words: Tensor) -> Tensor:
    """Words -> float32 in (0, 1), spacing 2^-32 near 0. Small values decide draws of rare tokens, hence all 32 bits."""
    return ((2 * words + 1).float() * 2.0**-33).clamp_max(1 - 2.0**-24)


def _exponential(w: Tensor) -> Tensor:
    """-log(1 - w). Below 1/4 the fraction comes from w itself: 1 - w would drop its low bits."""
    near = _log_of_fraction(-w / (2 - w))
    return -torch.where(w < 0.25, near, _log(1 - w))


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32, within 3 ulp: x = m * 2^e, m in [sqrt(1/2), sqrt(2))."""
    bits = x.view(torch.int32)
    shifted = bits - _SQRT_HALF_BITS
    exponent = shifted >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    e = exponent.float()
    return e * _LN2_HIGH + (e * _LN2_LOW + _log_of_fraction((m - 1) / (m + 1)))


def _log_of_fraction(s: Tensor) -> Tensor:
    """log((1 + s) / (1 - s)) = 2 (s + s^3/3 + s^5/5 + ...) for |s| <= 0.172, where s^11/11 is under float32's last bit."""
    z = s * s
    tail = z * (2 / 9) + 2 / 7
    tail = z * tail + 2 / 5
    tail = z * tail + 2 / 3
    return 2 * s + s * (z * tail)
