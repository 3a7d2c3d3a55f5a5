"""PTX text to `Kernel`.

Covers what NVVM writes for CuTeDSL: untyped registers, one flat body per entry, `{ }` scopes of inline assembly, calls of
external functions (printf), `.loc` lines. What an instruction means is not known here: any opcode parses. Any other syntax
raises `ParseError` with its line; nothing is skipped but debug sections and the directives listed in `_IGNORED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from dsv4lab.sim.errors import SimulatorError
from dsv4lab.sim.program import (
    Address,
    Guard,
    Immediate,
    Instruction,
    Kernel,
    Label,
    LocalVariable,
    Location,
    Not,
    Operand,
    Pair,
    Param,
    Register,
    SharedVariable,
    Symbol,
    Vector,
)

_SIZES = {
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
    "b128": 16,
}
_SPECIAL_XYZ = {f"%{prefix}{name}" for name in ("tid", "ctaid", "clusterid", "cluster_ctaid") for prefix in ("", "n")} | {
    "%cluster_nctaid"
}
_SPECIAL = {
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid", "%current_graph_exec"),
    *("%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster"),
    *("%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size"),
    *(f"%reserved_smem_offset_{which}" for which in ("begin", "end", "cap")),
    *("%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi"),
    *(f"%lanemask_{relation}" for relation in ("eq", "le", "lt", "ge", "gt")),
}
_IGNORED = (".pragma", ".explicitcluster", ".blocksareclusters", ".noreturn")

_WORD = r"[%$A-Za-z_][\w$]*"
_TOKEN = re.compile(
    rf"0[fF][0-9a-fA-F]{{8}}|0[dD][0-9a-fA-F]{{16}}|0[xX][0-9a-fA-F]+U?|\d+U?|{_WORD}(?:\.\w+)?|[\[\]{{}}(),|!+-]"
)
_LABEL = re.compile(rf"({_WORD})\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:\s*,\s*function_name\b[^\n]*)?[^\n]*")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"((?:[^"\\]|\\.)*)"', re.M)
_ENTRY = re.compile(rf"(?:\.visible\s+|\.weak\s+)?\.entry\s+({_WORD})\s*\(")
_PARAM = re.compile(
    rf"\.param\s+(?:\.align\s+(?P<before>\d+)\s+)?\.(?P<type>\w+)\s+(?:\.ptr\s*(?:\.(?:global|shared|const|local)\s*)?"
    rf"(?:\.align\s+\d+\s+)?)?(?P<name>{_WORD})\s*(?:\[(?P<count>\d+)\])?\s*$"
)
_VARIABLE = re.compile(
    rf"(?:\.(?:extern|visible|weak)\s+)*\.(?P<space>shared|local|global|const)\s+(?:\.attribute\([^)]*\)\s*)?"
    rf"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>{_WORD})\s*(?P<array>\[\d*\])?\s*(?:=\s*(?P<value>.*))?$",
    re.S,
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)$", re.S)
_RANGE = re.compile(rf"({_WORD})<(\d+)>$")
_REGISTER_FILE = 65_536  # of a multiprocessor of sm_90 and sm_100
_SHAPE = re.compile(r"\.(reqntid|maxntid|reqnctapercluster|maxclusterrank|maxnreg|minnctapersm)\s+(\d+(?:\s*,\s*\d+)*)")


class ParseError(SimulatorError):
    """PTX that the parser does not understand, with its line."""


@dataclass
class _Scope:
    """Names declared between one pair of braces; number 0 is the body itself."""

    number: int
    parent: _Scope | None
    registers: dict[str, str] = field(default_factory=dict)  # name as written -> unique name
    labels: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)

    def unique(self, name: str) -> str:
        return f"{name}${self.number}" if self.number else name

    def find(self, kind: str, name: str) -> str | None:
        scope: _Scope | None = self
        while scope is not None:
            found: str | None = getattr(scope, kind).get(name)
            if found is not None:
                return found
            scope = scope.parent
        return None


@dataclass
class _Statement:
    text: str
    line: int
    scope: _Scope
    location: tuple[int, int] | None


def parse(text: str, name: str | None = None) -> Kernel:
    """The entry point `name` of a PTX module, or its only one. Raises `ParseError`; `KeyError` where there is no such entry."""
    kernels = parse_module(text)
    if name is not None:
        return kernels[name]
    if len(kernels) != 1:
        raise KeyError(f"name one of the module's entry points: {', '.join(kernels) or 'it has none'}")
    return next(iter(kernels.values()))


def parse_module(text: str) -> dict[str, Kernel]:
    """Every entry point of a PTX module by name."""
    return _Module(text).kernels


class _Module:
    def __init__(self, text: str) -> None:
        self.source = text
        self.text = _without_comments(_without_assembly_lines(text))
        target = re.search(r"\.target\s+(\w+)", self.text)
        self.target = target[1] if target else ""
        self.files = {int(number): path for number, path in _FILE.findall(self.text)}
        self.shared: list[SharedVariable] = []
        self.constants: dict[str, bytes] = {}
        self.kernels: dict[str, Kernel] = {}
        position = 0
        while (position := self.skip_space(position)) < len(self.text):
            position = self._item(position)

    def error(self, position: int, why: str) -> ParseError:
        line = self.text.count("\n", 0, position) + 1
        return ParseError(f"PTX line {line}: {why}: {self.text[position : position + 160].splitlines()[0].strip()!r}")

    def skip_space(self, position: int) -> int:
        return (
            position + len(self.text[position:]) - len(self.text[position:].lstrip()) if position < len(self.text) else position
        )

    def _item(self, position: int) -> int:
        """One thing at module level; returns the position after it."""
        entry = _ENTRY.match(self.text, position)
        if entry:
            return self._entry(entry)
        rest = self.text[position : position + 40]
        if rest.startswith((".version", ".target", ".address_size", ".file", ".loc")):
            end = self.text.find("\n", position)
            return len(self.text) if end < 0 else end
        if rest.startswith(".section"):
            return self._closing(self.text.index("{", position)) + 1
        if re.match(r"\.extern\s+\.func\b", rest):
            return self.end_of(";", position)
        if re.match(r"(\.(extern|visible|weak)\s+)*\.(shared|global|const)\b", rest):
            end = self.end_of(";", position)
            self._variable(position, self.text[position : end - 1].strip())
            return end
        raise self.error(position, "unknown module-level syntax")

    def end_of(self, mark: str, position: int, limit: int | None = None) -> int:
        end = self.text.find(mark, position, limit)
        if end < 0:
            raise self.error(position, f"no {mark!r} after")
        return end + 1

    def _closing(self, opening: int) -> int:
        depth = 0
        for brace in re.compile(r"[{}]").finditer(self.text, opening):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return brace.start()
        raise self.error(opening, "unbalanced braces")

    def _variable(self, position: int, text: str) -> None:
        match = _VARIABLE.match(text)
        if match is None or match["type"] not in _SIZES:
            raise self.error(position, "unknown variable declaration")
        element = _SIZES[match["type"]]
        count = 1 if match["array"] is None else int(match["array"][1:-1] or 0)
        align = int(match["align"] or element)
        if match["space"] == "shared":
            self.shared.append(SharedVariable(match["name"], 0, element * count, align))
        elif match["value"] is None:
            self.constants[match["name"]] = bytes(element * count)
        else:
            values = re.findall(r"-?\b(?:0[xX][0-9a-fA-F]+|\d+)\b", match["value"])
            if re.sub(r"[\s{},U]|-?\b(?:0[xX][0-9a-fA-F]+|\d+)U?\b", "", match["value"]):
                raise self.error(position, "unknown initialiser")
            data = b"".join((int(v, 0) % (1 << 8 * element)).to_bytes(element, "little") for v in values)
            self.constants[match["name"]] = data.ljust(element * count, b"\0")

    def _entry(self, entry: re.Match[str]) -> int:
        opening = self.text.find("{", entry.end())
        close = self.text.rfind(")", entry.end(), opening)
        if opening < 0 or close < 0:
            raise self.error(entry.start(), "entry without a body")
        params: list[Param] = []
        offset = 0
        for declaration in filter(str.strip, self.text[entry.end() : close].split(",")):
            match = _PARAM.match(declaration.strip())
            if match is None or match["type"] not in _SIZES:
                raise self.error(entry.start(), f"unknown parameter {declaration.strip()!r} of")
            size = _SIZES[match["type"]] * int(match["count"] or 1)
            align = int(match["before"] or _SIZES[match["type"]])
            offset = -(-offset // align) * align
            params.append(Param(match["name"], offset, size, align))
            offset += size
        directives = self.text[close + 1 : opening]
        shapes = {kind: _shape(numbers) for kind, numbers in _SHAPE.findall(directives)}
        left = _SHAPE.sub("", directives)
        for word in re.findall(r"\.\w+", left):
            if word not in _IGNORED:
                raise self.error(close, f"unknown directive {word}")
        end = self._closing(opening)
        body = _Body(self, params, opening + 1, end)
        self.kernels[entry[1]] = Kernel(
            name=entry[1],
            target=self.target,
            params=tuple(params),
            instructions=tuple(body.instructions),
            labels=body.labels,
            registers=body.used,
            shared=_in_order(body.shared),
            local=tuple(body.local),
            max_threads=shapes.get("reqntid"),
            thread_registers=_registers_at_entry(shapes),
            cluster=shapes.get("reqnctapercluster"),
            constants=self.constants,
            call_params=body.call_params,
            source=self.source,
        )
        return end + 1


def _registers_at_entry(shapes: dict[str, tuple[int, int, int]]) -> int:
    """Registers of a thread at launch where the directives fix them, else 0: ptxas then drops every setmaxnreg."""
    if "maxnreg" in shapes:
        return shapes["maxnreg"][0]
    threads = shapes.get("reqntid") or shapes.get("maxntid")
    if "minnctapersm" not in shapes or threads is None:
        return 0
    share = _REGISTER_FILE // (threads[0] * threads[1] * threads[2] * shapes["minnctapersm"][0])
    return min(share // 8 * 8, 255)


class _Body:
    """The instructions of one entry. Statements are collected first: labels may be used before they are defined."""

    def __init__(self, module: _Module, params: list[Param], start: int, end: int) -> None:
        self.module = module
        self.start, self.end = start, end
        self.shared = list(module.shared)
        self.local: list[LocalVariable] = []
        self.call_params: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.used: dict[str, str] = {}
        self.instructions: list[Instruction] = []
        self._types: dict[str, str] = {}
        self._ranges: dict[str, tuple[int, str]] = {}
        self._simple: dict[str, Operand] = {}
        self._scopes = 0
        root = _Scope(0, None)
        root.symbols = {p.name: p.name for p in params}
        root.symbols |= {v.name: v.name for v in module.shared} | {name: name for name in module.constants}
        statements = list(self._statements(root))
        for statement in statements:
            self.instructions.append(self._instruction(statement))

    def _statements(self, root: _Scope) -> Iterator[_Statement]:
        text, position, scope = self.module.text, self.start, root
        line, counted = text.count("\n", 0, position) + 1, position
        location: tuple[int, int] | None = None
        count = 0
        while (position := self.module.skip_space(position)) < self.end:
            line += text.count("\n", counted, position)
            counted = position
            character = text[position]
            if character == "{":
                self._scopes += 1
                scope = _Scope(self._scopes, scope)
                position += 1
            elif character == "}":
                if scope.parent is None:
                    raise self.module.error(position, "unbalanced braces")
                scope = scope.parent
                position += 1
            elif character == ".":
                loc = _LOC.match(text, position)
                if loc:
                    location = (int(loc[1]), int(loc[2])) if int(loc[2]) else location
                    position = loc.end()
                else:
                    end = self.module.end_of(";", position, self.end)
                    self._declare(position, text[position : end - 1].strip(), scope)
                    position = end
            elif label := _LABEL.match(text, position):
                if label[1] in scope.labels:
                    raise self.module.error(position, "label defined twice")
                scope.labels[label[1]] = scope.unique(label[1])
                self.labels[scope.unique(label[1])] = count
                position = label.end()
            else:
                end = self.module.end_of(";", position, self.end)
                yield _Statement(text[position : end - 1].strip(), line, scope, location)
                count += 1
                position = end

    def _declare(self, position: int, text: str, scope: _Scope) -> None:
        if registers := _REGISTERS.match(text):
            kind = registers[1]
            if kind != "pred" and kind not in _SIZES:
                raise self.module.error(position, f"unknown register type .{kind}")
            kind = kind if kind == "pred" else f"b{8 * _SIZES[kind]}"
            for name in re.split(r"\s*,\s*", registers[2].strip()):
                if many := _RANGE.match(name):
                    for number in range(int(many[2])) if scope.number else ():
                        self._add_register(f"{many[1]}{number}", kind, scope)
                    if not scope.number:
                        self._ranges[many[1]] = (int(many[2]), kind)
                elif re.fullmatch(_WORD, name):
                    self._add_register(name, kind, scope)
                else:
                    raise self.module.error(position, "unknown register declaration")
            return
        if text.startswith(".param"):
            match = _PARAM.match(text)
            if match is None or match["type"] not in _SIZES:
                raise self.module.error(position, "unknown call parameter")
            scope.symbols[match["name"]] = scope.unique(match["name"])
            self.call_params[scope.unique(match["name"])] = _SIZES[match["type"]] * int(match["count"] or 1)
            return
        variable = _VARIABLE.match(text)
        if variable and variable["type"] in _SIZES and variable["space"] in ("local", "shared") and variable["value"] is None:
            element = _SIZES[variable["type"]]
            size = element * (1 if variable["array"] is None else int(variable["array"][1:-1] or 0))
            align, name = int(variable["align"] or element), scope.unique(variable["name"])
            scope.symbols[variable["name"]] = name
            if variable["space"] == "shared":
                self.shared.append(SharedVariable(name, 0, size, align))
            else:
                offset = self.local[-1].offset + self.local[-1].size if self.local else 0
                self.local.append(LocalVariable(name, -(-offset // align) * align, size, align))
            return
        if not text.startswith(_IGNORED):
            raise self.module.error(position, "unknown directive")

    def _add_register(self, name: str, kind: str, scope: _Scope) -> None:
        scope.registers[name] = scope.unique(name)
        self._types[scope.unique(name)] = kind

    def _instruction(self, statement: _Statement) -> Instruction:
        head = re.match(rf"(?:@(!?)\s*({_WORD})\s+)?([A-Za-z][\w.:]*)\s*", statement.text)
        if head is None:
            raise self._error(statement, "unknown statement")
        guard = None
        if head[2]:
            guard = Guard(self._register(head[2], statement), bool(head[1]))
        opcode = head[3]
        operands = _Operands(self, statement, head.end(), opcode.split(".")[0]).parse()
        location = None
        if statement.location:
            number, line = statement.location
            if number not in self.module.files:
                raise self._error(statement, f".loc names file {number}, which no .file declares, before")
            location = Location(self.module.files[number], line)
        text = " ".join(statement.text.split())
        return Instruction(len(self.instructions), opcode, operands, guard, location, text)

    def _register(self, name: str, statement: _Statement) -> Register:
        unique = self._declared(name, statement.scope)
        if unique is None:
            raise self._error(statement, f"register {name} was never declared")
        return Register(unique)

    def _declared(self, name: str, scope: _Scope) -> str | None:
        unique = scope.find("registers", name)
        if unique is None:
            stem = name.rstrip("0123456789")
            count, kind = self._ranges.get(stem, (0, ""))
            if stem == name or int(name[len(stem) :]) >= count:
                return None
            unique, self._types[name] = name, kind
        self.used[unique] = self._types[unique]
        return unique

    def _error(self, statement: _Statement, why: str) -> ParseError:
        return ParseError(f"PTX line {statement.line}: {why}: {' '.join(statement.text.split())[:200]!r}")


class _Operands:
    """Recursive descent over the operands of one statement."""

    def __init__(self, body: _Body, statement: _Statement, start: int, family: str) -> None:
        self.body, self.statement = body, statement
        self.branch, self.call = family == "bra", family == "call"
        self.tokens: list[str] = []
        text, position = statement.text, start
        while position < len(text):
            if text[position].isspace():
                position += 1
                continue
            token = _TOKEN.match(text, position)
            if token is None:
                raise body._error(statement, f"unknown operand syntax at {text[position : position + 20]!r}")
            self.tokens.append(token[0])
            position = token.end()
        self.at = 0

    def parse(self) -> tuple[Operand, ...]:
        if not self.tokens:
            return ()
        operands = [self._operand()]
        while self.at < len(self.tokens):
            self._expect(",")
            operands.append(self._operand())
        return tuple(operands)

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _next(self) -> str:
        if self.at >= len(self.tokens):
            raise self.body._error(self.statement, "operand missing")
        self.at += 1
        return self.tokens[self.at - 1]

    def _expect(self, token: str) -> None:
        found = self._next()
        if found != token:
            raise self.body._error(self.statement, f"expected {token!r}, found {found!r}")

    def _operand(self) -> Operand:
        token = self._peek()
        if token == "[":
            return self._address()
        if token in "{(" and token:
            return self._list("{}" if token == "{" else "()")
        if token == "!":
            self._next()
            return Not(self._as_register(self._name(self._next())))
        if token in ("-", "+") or token[:1].isdigit():
            return self._number()
        first = self._name(self._next())
        if self._peek() == "|":
            self._next()
            return Pair(self._as_register(first), self._as_register(self._name(self._next())))
        return first

    def _as_register(self, operand: Operand) -> Register:
        if not isinstance(operand, Register):
            raise self.body._error(self.statement, f"{operand} is not a register")
        return operand

    def _list(self, brackets: str) -> Vector:
        self._expect(brackets[0])
        items: list[Operand] = []
        while self._peek() != brackets[1]:
            if items:
                self._expect(",")
            items.append(self._operand())
        self._expect(brackets[1])
        return Vector(tuple(items))

    def _address(self) -> Address:
        self._expect("[")
        base = self._operand()
        if not isinstance(base, Register | Symbol | Immediate):
            raise self.body._error(self.statement, f"{base} is no base address")
        offset, coordinates = 0, None
        if self._peek() in ("+", "-"):
            sign = -1 if self._next() == "-" else 1
            number = self._number()
            offset = sign * number.value
        if self._peek() == ",":
            self._next()
            coordinates = self._list("{}")
        self._expect("]")
        return Address(base, offset, coordinates)

    def _number(self) -> Immediate:
        sign = 1
        while self._peek() in ("-", "+"):
            sign = -sign if self._next() == "-" else sign
        token = self._next()
        if token[:2] in ("0f", "0F", "0d", "0D"):
            if sign < 0:
                raise self.body._error(self.statement, "negated float literal")
            return Immediate(int(token[2:], 16), "f32" if token[1] in "fF" else "f64")
        if not token[0].isdigit():
            raise self.body._error(self.statement, f"{token!r} is not a number")
        digits = token.rstrip("U")
        octal = len(digits) > 1 and digits.isdigit() and digits[0] == "0"
        return Immediate(sign * int(digits, 8 if octal else 0))

    def _name(self, token: str) -> Operand:
        body, scope = self.body, self.statement.scope
        if not scope.number and (known := body._simple.get(token)) is not None:
            return known
        operand = self._lookup(token)
        if not scope.number:
            body._simple[token] = operand
        return operand

    def _lookup(self, token: str) -> Operand:
        body, statement = self.body, self.statement
        if token == "_":
            return Register("_")
        if self.branch:
            label = statement.scope.find("labels", token)
            if label is None:
                raise body._error(statement, f"label {token} is not defined")
            return Label(label)
        stem, _, component = token.partition(".")
        if stem in _SPECIAL_XYZ and component in ("x", "y", "z"):
            return Register(stem, component)
        if not component:
            if token in _SPECIAL:
                return Register(token)
            unique = body._declared(token, statement.scope)
            if unique is not None:
                return Register(unique)
            symbol = statement.scope.find("symbols", token)
            if symbol is not None:
                return Symbol(symbol)
            if self.call:
                return Symbol(token)  # an external function
        raise body._error(statement, f"{token} was never declared")


def _in_order(variables: list[SharedVariable]) -> tuple[SharedVariable, ...]:
    """Shared variables with their offsets: the dynamic array (size 0) comes after all others, wherever it was declared."""
    placed: list[SharedVariable] = []
    end = 0
    for variable in sorted(variables, key=lambda v: v.size == 0):
        offset = -(-end // variable.align) * variable.align
        placed.append(replace(variable, offset=offset))
        end = offset + variable.size
    return tuple(placed)


def _shape(numbers: str) -> tuple[int, int, int]:
    x, y, z = ([int(n) for n in numbers.split(",")] + [1, 1])[:3]
    return x, y, z


def _without_comments(text: str) -> str:
    """The text with comments blanked, line numbers and strings kept."""
    pattern = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|/\*.*?\*/', re.S)
    return pattern.sub(lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n"), text)


def _without_assembly_lines(text: str) -> str:
    """The text without `.loc` inside inline assembly, where NVVM counts the assembly's own lines on from the Python line."""
    inside = re.compile(r"// begin inline asm\n.*?// end inline asm", re.S)
    return inside.sub(lambda m: re.sub(r"(?m)^\s*\.loc\b[^\n]*", "", m[0]), text)
