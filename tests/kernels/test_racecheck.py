"""The reading of racecheck's reports; the tool itself runs on the GPU machine only."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.racecheck import KNOWN, UNEXPLAINED, classes, faults

AT = "at kernel_cutlass_kernel_dsv4labkernelsgemmmixedsm90MixedLinearSm90_object_at__None_te_0+0xb40 in PATH"
TEXT = f"""========= COMPUTE-SANITIZER
========= Error: Race reported between Write access {AT}:2
=========     and Read access {AT}:7 [3968 hazards]
=========     and Read access {AT}:6 [31744 hazards]
=========
========= Warning: Race reported between Read access {AT}:6
=========     and Write access {AT}:2 [256 hazards]
=========
========= Potential invalid __shared__ read of size 16 bytes
=========     {AT}:6
=========     by thread (32,0,0) in block (0,0,0)
=========     Address 0x1003ba0 is located in a block that might have already exited
all as the reference has it
========= Target application returned an error
========= RACECHECK SUMMARY: 100 hazards displayed (1141 errors, 50 warnings)
"""


def test_reports_are_classed_by_functions(tmp_path: Path) -> None:
    (tmp_path / "ptx.py").write_text(
        "def copy_bulk():\n    pass\n\ndef load_words():\n    def inner():\n        pass\n    pass\n"
    )
    assert classes(TEXT.replace("PATH", str(tmp_path / "ptx.py"))) == {
        "MixedLinearSm90 copy_bulk load_words": 1,
        "MixedLinearSm90 copy_bulk inner": 2,
        "MixedLinearSm90 - inner": 1,
        "Target application returned an error": 1,
    }


def test_faults() -> None:
    assert faults({"race", *KNOWN}, {key for keys in KNOWN.values() for key in keys}) == []
    assert faults({"race", *KNOWN}, {"A b c"}) == ["of no class: A b c"]
    assert faults({*KNOWN} - {"elected"}, set()) == ["not reported: elected", "not reported: race"]
    for name, (key, *_) in UNEXPLAINED.items():
        assert faults({"race", *KNOWN}, {key}) == [f"unexplained: {key}, perhaps like {name}, which is not reported"]
