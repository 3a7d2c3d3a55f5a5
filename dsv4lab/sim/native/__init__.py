"""The native core: C code that executes runs of instructions and declines what it does not know.

The numpy handlers stay the reference. The two agree bit for bit (NaN payloads aside), and every error comes from a handler:
an instruction that the C code finds anything irregular about is left, untouched, to Python. `library` builds and loads the
code, `bytecode` turns decoded instructions into its records, `core` runs them within the machine.
"""
