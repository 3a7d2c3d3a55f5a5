"""Measure the kernels and write the baselines, `baselines/<device>.jsonl.xz`: one command for all of it.

python benchmarks/run.py [OUT.jsonl.xz] [--only SUITE,..] [--quick] [--append]
python benchmarks/run.py [OUT.jsonl.xz] --merge ROWS.jsonl ..

`--help` tells the rest; `common.py` how it is measured, each suite's module what.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's modules are `benchmarks.x`, not `x`
    from benchmarks.runner import main

    main()
