"""PTX text to kernels: every syntactic form, and what is refused."""

from __future__ import annotations

import pytest

from dsv4lab.sim.program import Address, Guard, Immediate, Label, Location, Not, Pair, Register, Symbol, Vector
from dsv4lab.sim.ptx import ParseError, parse, parse_module

HEADER = ".version 9.4\n.target sm_100a\n.address_size 64\n"


def kernel(body: str, params: str = "", before: str = "", directives: str = ".reqntid 128, 1, 1", after: str = ""):
    registers = ".reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;"
    text = f"{HEADER}{before}\n.visible .entry k({params})\n{directives}\n{{\n{registers}\n{body}\n}}\n{after}"
    return parse(text)


def operands(statement: str, **more: str) -> tuple:
    return kernel(statement + "; ret;", **more).instructions[0].operands


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov.u32 %r1, %tid.x", (Register("%r1"), Register("%tid", "x"))),
        ("mov.u32 %r1, %laneid", (Register("%r1"), Register("%laneid"))),
        ("add.s32 %r1, %r2, -7", (Register("%r1"), Register("%r2"), Immediate(-7))),
        ("and.b32 %r1, %r2, 0xFFU", (Register("%r1"), Register("%r2"), Immediate(255))),
        ("mov.b32 %r1, 010", (Register("%r1"), Immediate(8))),
        ("mov.b32 %r1, 0f3F800000", (Register("%r1"), Immediate(0x3F800000, "f32"))),
        ("mov.b64 %rd1, 0d3FF0000000000000", (Register("%rd1"), Immediate(0x3FF0000000000000, "f64"))),
        ("ld.global.b32 %r1, [%rd1+16]", (Register("%r1"), Address(Register("%rd1"), 16))),
        ("ld.global.b32 %r1, [%rd1+-4]", (Register("%r1"), Address(Register("%rd1"), -4))),
        ("ld.shared.b32 %r1, [64]", (Register("%r1"), Address(Immediate(64)))),
        (
            "ld.global.v2.b32 {%r1, %r2}, [%rd1]",
            (Vector((Register("%r1"), Register("%r2"))), Address(Register("%rd1"))),
        ),
        ("mov.b64 {%r1, _}, %rd1", (Vector((Register("%r1"), Register("_"))), Register("%rd1"))),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4]",
            (
                Address(Register("%r1")),
                Address(Register("%rd1"), 0, Vector((Register("%r2"), Register("%r3")))),
                Address(Register("%r4")),
            ),
        ),
        ("elect.sync %r1|%p1, -1", (Pair(Register("%r1"), Register("%p1")), Immediate(-1))),
        ("elect.sync _|%p1, -1", (Pair(Register("_"), Register("%p1")), Immediate(-1))),
        (
            "setp.lt.and.s32 %p1|%p2, %r1, 3, !%p3",
            (Pair(Register("%p1"), Register("%p2")), Register("%r1"), Immediate(3), Not(Register("%p3"))),
        ),
        ("wgmma.fence.sync.aligned", ()),
    ],
)
def test_operands(text: str, expected: tuple) -> None:
    assert operands(text) == expected


def test_opcodes_keep_their_full_form_and_guards_their_sign() -> None:
    first, second, _ = kernel("@%p1 st.global.b32 [%rd1], %r1;\n@!%p2 bra.uni END;\nEND: ret;").instructions
    assert (first.opcode, first.guard) == ("st.global.b32", Guard(Register("%p1")))
    assert (second.opcode, second.guard, second.operands) == ("bra.uni", Guard(Register("%p2"), True), (Label("END"),))


def test_labels_point_at_the_next_instruction_also_before_their_definition() -> None:
    found = kernel("bra $L__BB0_2;\n$L__BB0_1:\nmov.b32 %r1, 1;\n$L__BB0_2:\nbra $L__BB0_1;\nret;")
    assert found.labels == {"$L__BB0_1": 1, "$L__BB0_2": 2}


def test_scopes_of_inline_assembly_do_not_mix() -> None:
    wait = "mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1], %r2;"
    block = f"{{\n.reg .pred P1;\nWAIT:\n{wait}\n@P1 bra DONE;\nbra WAIT;\nDONE:\n}}\n"
    found = kernel(block + block + "ret;")
    first, second = found.instructions[0], found.instructions[3]
    assert first.operands[0] != second.operands[0]
    assert sorted(found.labels.values()) == [0, 3, 3, 6]
    for index, target in ((1, 3), (2, 0), (4, 6), (5, 3)):
        label = found.instructions[index].operands[0]
        assert isinstance(label, Label)
        assert found.labels[label.name] == target
    assert set(found.registers.values()) == {"pred", "b32"}


def test_inner_scopes_see_outer_names_and_hide_them() -> None:
    found = kernel("{ .reg .b32 t; mov.b32 t, %r1; { .reg .b64 t; mov.b64 t, %rd1; } mov.b32 %r2, t; } ret;")
    outer, inner, again = (instruction.operands for instruction in found.instructions[:3])
    assert outer[0] == again[1] != inner[0]
    assert found.registers[inner[0].name] == "b64"


def test_params_are_laid_out_by_size_and_alignment() -> None:
    params = ".param .u8 a,\n.param .align 64 .b8 map[128],\n.param .u64 .ptr .global .align 16 p,\n.param .b32 n"
    found = kernel("ld.param.b64 %rd1, [p];\nmov.b64 %rd2, map;\nret;", params=params)
    assert [(p.name, p.offset, p.size, p.align) for p in found.params] == [
        ("a", 0, 1, 1),
        ("map", 64, 128, 64),
        ("p", 192, 8, 8),
        ("n", 200, 4, 4),
    ]
    assert found.instructions[1].operands[1] == Symbol("map")


def test_dynamic_shared_memory_follows_the_static_variables() -> None:
    before = ".extern .shared .align 1024 .b8 dynamic[];\n.shared .align 8 .b8 bars[24];\n.shared .align 4 .b32 flag;"
    found = kernel("mov.b32 %r1, dynamic; ret;", before=before)
    assert [(v.name, v.offset, v.size) for v in found.shared] == [("bars", 0, 24), ("flag", 24, 4), ("dynamic", 1024, 0)]


def test_lines_of_inline_assembly_are_the_python_line_that_wrote_it() -> None:
    assembly = "// begin inline asm\n{\n.loc 1 19 4\nWAIT:\n.loc 1 20 4\nmov.b32 %r1, 2;\n}\n// end inline asm\n"
    found = kernel(".loc 1 17 4\n" + assembly + "mov.b32 %r1, 3;\nret;", after='.file 1 "k.py"\n')
    assert [str(i.location) for i in found.instructions] == ["k.py:17"] * 3


def test_locals_constants_and_calls() -> None:
    before = (
        ".extern .func  (.param .b32 func_retval0) vprintf\n(\n.param .b64 p0,\n.param .b64 p1\n)\n;\n"
        ".global .align 1 .b8 $str[4] = {37, 100, 10};\n"
    )
    body = (
        ".local .align 8 .b8 __local_depot0[24];\n.reg .b64 %SP;\nmov.b64 %SP, __local_depot0;\nmov.b64 %rd1, $str;\n"
        "{ // callseq 0, 0\n.param .b64 param0;\n.param .b64 param1;\n.param .b32 retval0;\nst.param.b64 [param0], %rd1;\n"
        "call.uni (retval0),\nvprintf,\n(param0, param1);\nld.param.b32 %r1, [retval0];\n}\nret;"
    )
    found = kernel(body, before=before)
    assert found.constants == {"$str": b"%d\n\0"}
    assert [(v.name, v.size) for v in found.local] == [("__local_depot0", 24)]
    call = next(i for i in found.instructions if i.opcode == "call.uni")
    results, function, arguments = call.operands
    assert function == Symbol("vprintf")
    assert isinstance(results, Vector)
    assert isinstance(arguments, Vector)
    assert [found.call_params[s.name] for s in (*results.items, *arguments.items)] == [4, 8, 8]


def test_source_lines_come_from_loc_and_file() -> None:
    body = (
        "mov.b32 %r1, 0;\n.loc 1 17 8\nmov.b32 %r1, 1;\n.loc 1 0 8\nmov.b32 %r1, 2;\n"
        ".loc 2 5 1, function_name $L__info_string0, inlined_at 1 17 8\nmov.b32 %r1, 3;\nret;"
    )
    after = '.file 1 "/work/kernel.py"\n.file 2 "/work/helper.py"\n.section .debug_str\n{\n$L__info_string0:\n.b8 95,0\n}\n'
    locations = [i.location for i in kernel(body, after=after).instructions]
    kernel_line, helper_line = Location("/work/kernel.py", 17), Location("/work/helper.py", 5)
    assert locations == [None, kernel_line, kernel_line, helper_line, helper_line]


def test_comments_vanish_but_strings_and_line_numbers_stay() -> None:
    found = kernel('/* two\nlines */ mov.b32 %r1, 1; // ; not an instruction\n.pragma "nounroll";\nret;')
    assert [i.opcode for i in found.instructions] == ["mov.b32", "ret"]


def test_directives_of_the_entry() -> None:
    found = kernel(
        "ret;", directives=".explicitcluster\n.reqntid 384\n.reqnctapercluster 2, 1, 1\n.minnctapersm 1\n.maxnreg 168"
    )
    assert (found.target, found.max_threads, found.cluster) == ("sm_100a", (384, 1, 1), (2, 1, 1))


def test_several_entries_are_told_apart_by_name() -> None:
    text = HEADER + ".visible .entry a() { ret; }\n.visible .entry b() { ret; }\n"
    assert list(parse_module(text)) == ["a", "b"]
    assert parse(text, "b").name == "b"
    with pytest.raises(KeyError, match="a, b"):
        parse(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r100, 1;", "%r100 was never declared"),
        ("mov.b32 %r1, nothing;", "nothing was never declared"),
        ("bra NOWHERE;", "label NOWHERE is not defined"),
        ("mov.b32 %r1 %r2;", "expected ','"),
        ("ld.global.b32 %r1, [%rd1;", "operand missing"),
        ("mov.b32 %r1, #;", "unknown operand syntax"),
        ("@%p99 ret;", "register %p99 was never declared"),
        (".reg .texture t;", "unknown register type"),
        (".branchtargets A, B;", "unknown directive"),
        ("A: ret; A: ret;", "label defined twice"),
        (".loc 3 1 1\nret;", "file 3"),
        ("mov.b32 %r1, 1", "no ';' after"),
    ],
)
def test_unknown_syntax_is_refused_with_its_line(body: str, message: str) -> None:
    with pytest.raises(ParseError, match=message) as refusal:
        kernel(body)
    assert str(refusal.value).startswith("PTX line ")


def test_the_line_of_an_error_is_that_of_the_text() -> None:
    with pytest.raises(ParseError, match="PTX line 7:"):
        parse(HEADER + ".visible .entry k()\n{\n.reg .b32 %r<3>;\nmov.b32 %r1, %r9;\nret;\n}")


def test_a_statement_ends_inside_its_entry() -> None:
    with pytest.raises(ParseError, match="no ';' after"):
        parse_module(HEADER + ".visible .entry a() { ret }\n.visible .entry b() { ret; }")


def test_unknown_module_syntax_is_refused() -> None:
    for text in (".tex .u64 t;", ".visible .func f() { ret; }", ".visible .entry k(.param .texref t) { ret; }"):
        with pytest.raises(ParseError, match="PTX line 4"):
            parse(HEADER + text)
