"""`pre`, `post_pre` and `head` of many tokens in one pass over the streams: 16 CTAs of a cluster share D, and every token.

A CTA keeps its sixteenth of `fn` for the whole launch, in registers and, where D is long, in shared memory. Tiles of 16 tokens
come by TMA and stay until they are collapsed, so that the streams are read from memory once. The CTAs send each other 16-byte
messages into shared memory (`st.async`), which an mbarrier there counts. Of every tile

    project     a warp multiplies blocks of 16 columns by `fn`, and the streams of each token by each other
    send        sums over these warps; those of token t go to CTA t, which has that token's coefficients to make
    mix         the coefficients, and the length of u = sum_j pre[j] X[j], to all CTAs
    collapse    other warps, when coefficients have come: u, rounded, / rms * weight, stored

    loads (a warp)     streams; with `post` also y, post, comb    full: have arrived    empty: are projected, collapsed, stored
    send, mix (two warps, every other tile each), Sinkhorn (a warp)    see `coefficients`
    stores (the warps that collapse)    with `post`: new streams, which `project` left in their places, by TMA

The length of u follows from the products of the streams, |u|^2 = sum_ij pre[i] pre[j] X[i].X[j], so that nobody need have u,
nor a second exchange, before it can be divided by: less to wait for, and a third fewer instructions. Those products are off by
some 2^-22 of their terms: of x by as much as a place of BF16 only where streams cancel each other to a fiftieth of their size.

There are as many places for messages as stages, and nobody is farther ahead: a tile is projected only when its stage is free,
so that the tile there before has been collapsed by the whole CTA; for which all CTAs had sent that tile's coefficients, and so
had taken its sums.

Numbers: `fn` is three BF16, whose sum is all of it, of comb's differences 24 bits; where those have no room two FP16, 22 bits,
scaled by a power of two for each row: then a block of streams is scaled by one for each token and warp, which makes a BF16 an
FP16 without loss down to 2^-28 of the largest. A product's sum runs over one warp's columns; all others are in float32, too.

Bytes: streams (and y) once, x (and new streams) once: Flash 336 MB (674 MB with `post`) for 8192 tokens. Flops of the tensor
core: 8.6 G multiply-adds for `fn` (9.4 G for Pro, scaled) and 2.1 G (3.8 G) for the streams' products, some 40 us beside 80.

Without `from __future__ import annotations`: CuTeDSL reads the annotations themselves.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from dsv4lab.kernels._common.ptx import copy_bulk
from dsv4lab.kernels._common.rings import Ring
from dsv4lab.kernels.mhc import values as val
from dsv4lab.kernels.mhc.coefficients import LOGITS, Coefficients
from dsv4lab.kernels.mhc.config import BATCH, BOX, COEFFICIENTS, MIXERS, RANKS, STREAMS, TILE, WARP, TogetherConfig
from dsv4lab.kernels.mhc.together_streams import BOX_BYTES, GATES, SUMS, Collapsing, Mail, Memory, Place, Projecting, Sending
from dsv4lab.kernels.quant.rows import encode as enc

_BOX_WORDS = BOX // 2


class Together:
    """The kernel of one `TogetherConfig`."""

    def __init__(self, plan: TogetherConfig) -> None:
        plan.check()
        self.plan = plan
        self.coefficients = Coefficients(plan.columns, MIXERS)
        self.whole = plan.outputs > STREAMS  # not the head: post and comb are results

    @cute.jit
    def __call__(
        self,
        streams: Any,
        y: Any,
        post: Any,
        comb: Any,
        fn: Any,
        unit: Any,
        base: Any,
        scale: Any,
        weight: Any,
        new: Any,
        out: Any,
        new_post: Any,
        new_comb: Any,
        eps: Float32,
        hc_eps: Float32,
        iters: Int32,
        ctas: Int32,
        stream: Any,
    ) -> None:
        """Arguments as for `Mix`, but fn, unit: `prepare_fragments`; ctas: a multiple of 16."""
        plan = self.plan
        swizzle = cute.make_swizzle(3, 4, 3)  # of 128 bytes
        box = cute.make_composed_layout(
            swizzle, 0, cute.make_layout((TILE, 1, _BOX_WORDS), stride=(_BOX_WORDS, TILE * _BOX_WORDS, 1))
        )
        flat = cute.make_composed_layout(swizzle, 0, cute.make_layout((TILE, _BOX_WORDS), stride=(_BOX_WORDS, 1)))
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        load_x, tma_x = cpasync.make_tiled_tma_atom(load, streams, box, (TILE, 1, _BOX_WORDS))
        load_y, tma_y, store_x, tma_new = None, y, None, new
        if cutlass.const_expr(plan.post):
            load_y, tma_y = cpasync.make_tiled_tma_atom(load, y, flat, (TILE, _BOX_WORDS))
            store_x, tma_new = cpasync.make_tiled_tma_atom(store, new, box, (TILE, 1, _BOX_WORDS))
        self.kernel(
            load_x, tma_x, load_y, tma_y, store_x, tma_new, post, comb, fn, unit, base, scale, weight, out, new_post, new_comb,
            eps, hc_eps, iters,
        ).launch(
            grid=[ctas, 1, 1], block=[plan.threads, 1, 1], cluster=[RANKS, 1, 1], min_blocks_per_mp=1,
            stream=stream, use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        load_x: Any,
        streams: Any,
        load_y: Any,
        y: Any,
        store_x: Any,
        new: Any,
        post: Any,
        comb: Any,
        fn: Any,
        unit: Any,
        base: Any,
        scale: Any,
        weight: Any,
        out: Any,
        new_post: Any,
        new_comb: Any,
        eps: Float32,
        hc_eps: Float32,
        iters: Int32,
    ) -> None:
        plan = self.plan
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(thread // WARP)
        cluster, clusters = block // RANKS, grid // RANKS
        count = (cute.ceil_div(out.shape[0], TILE) - cluster + clusters - 1) // clusters
        place = Place(block % RANKS, cluster, clusters, count)

        memory = SmemAllocator()
        swizzle = cute.make_swizzle(3, 4, 3)
        x = memory.allocate_tensor(
            Uint32,
            cute.make_layout(
                (TILE, 1, _BOX_WORDS, STREAMS, plan.boxes, plan.stages),
                stride=(_BOX_WORDS, 0, 1, plan.stream_bytes // 4, TILE * _BOX_WORDS, plan.tile_bytes // 4),
            ),
            byte_alignment=1024,
            swizzle=swizzle,
        )
        added = x
        if cutlass.const_expr(plan.post):
            added = memory.allocate_tensor(
                Uint32,
                cute.make_layout(
                    (TILE, _BOX_WORDS, plan.boxes, plan.stages),
                    stride=(_BOX_WORDS, 1, TILE * _BOX_WORDS, plan.boxes * TILE * _BOX_WORDS),
                ),
                byte_alignment=1024,
                swizzle=swizzle,
            )
        ring = Ring.allocate(memory, plan.stages)  # after what lies at multiples of 1024
        made = memory.allocate_array(Int64, plan.stages)  # new streams are in their places
        given = made
        if cutlass.const_expr(plan.post):
            given = memory.allocate_array(Float32, plan.stages * TILE * COEFFICIENTS, byte_alignment=16)
        rest = memory.allocate_tensor(Uint32, cute.make_layout(max(plan.shared_words, 4)), byte_alignment=16)
        sums = memory.allocate_tensor(
            Float32, cute.make_layout((plan.pitch, TILE, plan.warps, plan.buffers)), byte_alignment=16
        )
        summed = Ring.allocate(memory, MIXERS)  # a turn for each, whether or not it has a place of its own
        mail = Mail(
            memory.allocate_tensor(Float32, cute.make_layout((4 * plan.vectors, RANKS, plan.stages)), byte_alignment=16),
            memory.allocate_tensor(Float32, cute.make_layout((STREAMS, TILE, plan.stages)), byte_alignment=16),
            memory.allocate_tensor(Float32, cute.make_layout((TILE, plan.stages)), byte_alignment=16),
            memory.allocate_array(Int64, 2 * plan.stages),
            plan.message_bytes,
            plan.stages,
        )
        logits = memory.allocate_tensor(Float64, cute.make_layout((LOGITS, BATCH, 2 if self.whole else 1)), byte_alignment=16)
        held_weight = memory.allocate_tensor(weight.element_type, cute.make_layout(plan.slice), byte_alignment=16)

        others = plan.warps + plan.collapse
        if warp == others:
            ring.init(full=1, empty=plan.warps + plan.collapse)
            summed.init(full=plan.warps, empty=1)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(plan.stages):
                    cute.arch.mbarrier_init(made + i, plan.warps)
                for i in cutlass.range_constexpr(plan.stages):
                    for kind in cutlass.range_constexpr(2):
                        cute.arch.mbarrier_init(mail.barrier(kind, i), 1)
                        if i < count:
                            mail.expect(kind, i)
            cute.arch.mbarrier_init_fence()
        for i in cutlass.range(thread, plan.slice, plan.threads, unroll=1):
            held_weight[i] = weight[place.rank * plan.slice + i]
        cute.arch.cluster_arrive()  # while they wait, projecting warps load `fn`, before streams that nobody could project yet
        cute.arch.griddepcontrol_launch_dependents()

        project_registers, collapse_registers, service_registers = plan.registers
        at = (x.iterator.toint(), added.iterator.toint(), given.toint(), rest.iterator.toint())
        room = Memory(*at, sums, held_weight)
        if warp < plan.warps:
            cute.arch.setmaxregister_increase(project_registers)
            Projecting(plan, place, mail, room, ring, made, warp).run(fn, summed, out.shape[0])
        elif warp < others:
            cute.arch.setmaxregister_decrease(collapse_registers)
            cute.arch.cluster_wait()
            Collapsing(plan, place, mail, room, ring, made, warp - plan.warps).run(out, store_x, x, new)
        else:
            cute.arch.setmaxregister_decrease(service_registers)
            cute.arch.cluster_wait()
            if warp == others:
                self._load(load_x, streams, load_y, y, post, comb, x, added, given, ring, place)
            elif warp == others + 1:
                self._sinkhorn(logits, new_comb, place, out.shape[0], hc_eps, iters)
            else:
                sending = Sending(plan, place, mail, room, summed)
                self._mix(sending, unit, base, scale, logits, new_post, eps, hc_eps, warp - others - 2)

    def _mine(self, place: Place, tokens: Any) -> tuple[Any, Any, Any]:
        """The tokens whose coefficients this CTA makes: first, step, number."""
        first, step = place.cluster * TILE + place.rank, place.clusters * TILE
        return first, step, cutlass.max(tokens - first + step - 1, 0) // step

    # ---- loads -----------------------------------------------------------------------------------------------------------
    @cute.jit
    def _load(
        self,
        load_x: Any,
        streams: Any,
        load_y: Any,
        y: Any,
        post: Any,
        comb: Any,
        x: Any,
        added: Any,
        given: Any,
        ring: Any,
        place: Any,
    ) -> None:
        plan = self.plan
        source = cute.local_tile(streams, (TILE, 1, _BOX_WORDS), (None, None, None))
        to_x, from_x = cpasync.tma_partition(
            load_x, 0, cute.make_layout(1), cute.group_modes(x, 0, 3), cute.group_modes(source, 0, 3)
        )
        to_y, from_y = to_x, from_x
        if cutlass.const_expr(plan.post):
            source = cute.local_tile(y, (TILE, _BOX_WORDS), (None, None))
            to_y, from_y = cpasync.tma_partition(
                load_y, 0, cute.make_layout(1), cute.group_modes(added, 0, 2), cute.group_modes(source, 0, 2)
            )
        cute.arch.griddepcontrol_wait()
        for i in cutlass.range(place.count, unroll=1):
            tile, stage = place.tile(i), ring.stage(i)
            ring.wait_empty(i)
            barrier = ring.full(i)
            size = Int32(plan.boxes * STREAMS * BOX_BYTES)
            if cutlass.const_expr(plan.post):
                tokens = cutlass.min(post.shape[0] - tile * TILE, TILE)
                size = plan.boxes * (STREAMS + 1) * BOX_BYTES + tokens * (COEFFICIENTS * 4)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
            for b in cutlass.range_constexpr(plan.boxes):
                column = place.rank * plan.boxes + b
                for j in cutlass.range_constexpr(STREAMS):
                    cute.copy(load_x, from_x[None, tile, j, column], to_x[None, j, b, stage], tma_bar_ptr=barrier)
                if cutlass.const_expr(plan.post):
                    cute.copy(load_y, from_y[None, tile, column], to_y[None, b, stage], tma_bar_ptr=barrier)
            if cutlass.const_expr(plan.post):
                target = given.toint() + stage * (TILE * COEFFICIENTS * 4)
                with cute.arch.elect_one():
                    copy_bulk(target, post[tile * TILE, None].iterator, tokens * (STREAMS * 4), barrier)
                    copy_bulk(target + TILE * STREAMS * 4, comb[tile * TILE, None].iterator, tokens * (LOGITS * 4), barrier)

    # ---- coefficients ----------------------------------------------------------------------------------------------------
    @cute.jit
    def _mix(
        self,
        sending: Any,
        unit: Any,
        base: Any,
        scale: Any,
        logits: Any,
        new_post: Any,
        eps: Any,
        hc_eps: Any,
        mixer: Any,
    ) -> None:
        """Of every other tile the CTA's sums, to those that make coefficients of them; then one token's coefficients, to all.

        In float32, whose last place is less than what the tensor core's sums are off.
        """
        plan, mail, place = self.plan, sending.mail, sending.place
        lane = cute.arch.lane_idx()
        output = cutlass.min(lane, plan.outputs - 1)
        slot, factor, offset = output, scale[cutlass.min(output // STREAMS, 2)], base[output]
        if output >= 2 * STREAMS:  # of comb: a row's logits less the first one's product and the largest base
            row = output // STREAMS * STREAMS
            slot = cutlass.max(output, row + 1) - output // STREAMS + 1
            largest = [cute.arch.fmax(base[row + k], base[row + k + 1]) for k in (0, 2)]
            offset = offset - cute.arch.fmax(*largest)
            if output == row:
                factor = Float32(0.0)
        factor = enc.mul(factor, unit[cutlass.min(slot, plan.rows - 1)])
        first, step, mine = self._mine(place, new_post.shape[0] if self.whole else Int32(0))
        places = [slot, plan.rows + lane % LOGITS]
        for i in cutlass.range(mixer, place.count, MIXERS, unroll=1):
            sending.send(i)
            mail.wait(SUMS, i)
            total, product = (enc.tree(enc.add, [mail.sums[n, r, mail.turn(i)] for r in range(RANKS)]) for n in places)
            if lane == 0 and i + mail.count < place.count:
                mail.expect(SUMS, i)
            square = enc.tree(enc.add, [cute.arch.shuffle_sync(product, (STREAMS + 1) * j) for j in range(STREAMS)])
            mean = enc.fma(square, Float32(1.0 / (STREAMS * plan.columns)), eps)
            z = enc.fma(enc.mul(total, val.rsqrt32(mean)), factor, offset)
            gate = val.sigmoid(z)
            pre = [cute.arch.shuffle_sync(gate, j) + hc_eps for j in range(STREAMS)]
            # The sum of u^2 from the streams' products with each other: nobody need wait for u itself
            row, column = (cute.arch.shuffle_sync(gate, j) + hc_eps for j in (lane // STREAMS % STREAMS, lane % STREAMS))
            whole = val.over_lanes(enc.mul(enc.mul(row, column), product), (1, 2, 4, 8), enc.add)
            whole = cute.arch.fmax(whole, Float32(0.0), nan=True)
            inverse = val.rsqrt(enc.fma(whole, Float32(1.0 / plan.columns), eps))
            if lane < RANKS:
                barrier = mail.barrier(GATES, i).toint()
                val.send_four(mail.gates[None, place.rank, mail.turn(i)].iterator.toint(), barrier, lane, pre)
                val.send_one(mail.inverses.iterator.toint() + (mail.turn(i) * TILE + place.rank) * 4, barrier, lane, inverse)
            if cutlass.const_expr(self.whole) and i < mine:
                self.coefficients.hand_over(z.to(Float64), logits, i, mine, lane)
                self.coefficients.store_post(gate, new_post, first + i * step, lane)
        if cutlass.const_expr(self.whole):
            self.coefficients.leave(mixer, mine)

    @cute.jit
    def _sinkhorn(self, logits: Any, new_comb: Any, place: Any, tokens: Any, hc_eps: Any, iters: Any) -> None:
        if cutlass.const_expr(self.whole):
            first, step, count = self._mine(place, tokens)
            self.coefficients.sinkhorn(logits, new_comb, first, step, count, hc_eps, iters)
