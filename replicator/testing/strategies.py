"""Hypothesis strategies for what a database consists of: schemas, transactions, WAL files and LTX files.

    @given(st.data())
    def test_anything_comes_back(data):
        schema = data.draw(schemas())
        for statement in schema.statements: connection.execute(statement)
        for sql, values in data.draw(transactions(schema)): connection.execute(sql, values)

All values are valid; damage is up to the test.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hypothesis import strategies as st

from replicator.format.checksum import wal_checksum
from replicator.format.ltx import TXID, Header

__all__ = [
    "GeneratedWAL",
    "LTXContent",
    "Schema",
    "Statement",
    "Table",
    "Transaction",
    "ltx_files",
    "page_images",
    "schemas",
    "transactions",
    "wal_files",
]

Statement = tuple[str, tuple[object, ...]]
Transaction = tuple[Statement, ...]
LTXContent = tuple[Header, list[tuple[int, bytes]]]

_KINDS = ("INTEGER", "REAL", "TEXT", "BLOB", "")
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
_VALUES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    _TEXT,
    st.binary(max_size=64),
    st.builds(lambda fill, size: (fill * size)[:size], st.binary(min_size=1, max_size=8), st.integers(0, 9000)),
)
_U32 = st.integers(0, 2**32 - 1)
_U64 = st.integers(0, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class Table:
    """A table `name` with an `id`, which is its primary key, and more columns."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables, and the statements that make them, in order: first the pragmas that only work on an empty database."""

    tables: tuple[Table, ...]
    statements: tuple[str, ...]


@st.composite
def schemas(draw: st.DrawFn, max_tables: int = 3) -> Schema:
    """Schemas with one to `max_tables` tables, indexes, a trigger or a view now and then, any page size and kind of auto-vacuum."""
    page_size = draw(st.sampled_from([512, 1024, 4096, 65536]))
    statements = [f"PRAGMA page_size={page_size}", f"PRAGMA auto_vacuum={draw(st.sampled_from(['NONE', 'FULL', 'INCREMENTAL']))}"]
    tables = []
    for number in range(draw(st.integers(1, max_tables))):
        columns = tuple(f"c{n}" for n in range(draw(st.integers(1, 4))))
        kinds = [draw(st.sampled_from(_KINDS)) for _ in columns]
        name = draw(st.sampled_from([f"t{number}", f"Table {number}", f"täble{number}"]))
        fields = ", ".join(["id INTEGER PRIMARY KEY", *(f"{column} {kind}".strip() for column, kind in zip(columns, kinds, strict=True))])
        statements.append(f'CREATE TABLE "{name}"({fields})')
        if draw(st.booleans()):
            statements.append(f'CREATE INDEX "i{number}" ON "{name}"({draw(st.sampled_from(columns))})')
        if draw(st.integers(0, 4)) == 0:
            statements.append(f'CREATE VIEW "v{number}" AS SELECT count(*) AS n FROM "{name}"')
        if draw(st.integers(0, 4)) == 0:
            body = f'UPDATE "{name}" SET {columns[0]} = NULL WHERE id = NEW.id - 100'
            statements.append(f'CREATE TRIGGER "g{number}" AFTER INSERT ON "{name}" BEGIN {body}; END')
        tables.append(Table(name, columns))
    return Schema(tuple(tables), tuple(statements))


@st.composite
def transactions(draw: st.DrawFn, schema: Schema, max_statements: int = 6) -> Transaction:
    """Statements of one transaction, without BEGIN and COMMIT, each with its values; all of them succeed whatever the tables hold."""
    return tuple(draw(_statements(schema)) for _ in range(draw(st.integers(1, max_statements))))


@st.composite
def _statements(draw: st.DrawFn, schema: Schema) -> Statement:
    table = draw(st.sampled_from(schema.tables))
    ids = st.integers(1, 50)
    column = draw(st.sampled_from(table.columns))
    match draw(st.sampled_from(["insert", "insert", "update", "delete", "many"])):
        case "insert":
            marks = ", ".join("?" * (1 + len(table.columns)))
            return f'INSERT OR REPLACE INTO "{table.name}" VALUES({marks})', (draw(ids), *(draw(_VALUES) for _ in table.columns))
        case "update":
            return f'UPDATE "{table.name}" SET {column} = ? WHERE id % ? = 0', (draw(_VALUES), draw(st.integers(1, 7)))
        case "delete":
            return f'DELETE FROM "{table.name}" WHERE id BETWEEN ? AND ?', (draw(ids), draw(ids))
        case _:
            numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) SELECT i + 1000, ? FROM n"
            return f'INSERT OR REPLACE INTO "{table.name}"(id, {column}) {numbers}', (draw(st.integers(1, 200)), draw(_VALUES))


@st.composite
def page_images(draw: st.DrawFn, size: int) -> bytes:
    """A page of `size` bytes: anything from all equal to incompressible."""
    seed = draw(st.binary(min_size=1, max_size=8))
    if draw(st.booleans()):
        import numpy as np

        return np.random.default_rng(list(seed)).bytes(size)
    return (seed * size)[:size]


@st.composite
def ltx_files(draw: st.DrawFn, *, page_sizes: tuple[int, ...] = (512, 1024, 4096)) -> LTXContent:
    """Header and pages of LTX files, full images among them, as `encode_file` takes them."""
    size = draw(st.sampled_from(page_sizes))
    low = draw(st.one_of(st.just(1), st.integers(2, 2**64 - 1)))
    high = draw(st.integers(low, 2**64 - 1))
    if low == 1:
        commit = draw(st.integers(1, 6))
        pgnos = list(range(1, commit + 1))
    else:
        commit = draw(st.integers(1, 2**18))
        pgnos = sorted(draw(st.sets(st.integers(1, commit), max_size=6)))
    wal = draw(st.integers(1, 2**63 - 1))
    header = Header(
        size, commit, TXID(low), TXID(high), draw(st.integers(-(2**63), 2**63 - 1)),
        wal_offset=wal, wal_size=draw(st.integers(0, 2**63 - 1)), wal_salt1=draw(_U32), wal_salt2=draw(_U32), node_id=draw(_U64),
    )  # fmt: skip
    return header, [(pgno, draw(page_images(size))) for pgno in pgnos]


@dataclass(frozen=True, slots=True)
class GeneratedWAL:
    """A WAL file and what is in it. `frames`: page number, commit (0: the transaction goes on), page."""

    page_size: int
    salts: tuple[int, int]
    big_endian: bool
    frames: tuple[tuple[int, int, bytes], ...]

    @property
    def data(self) -> bytes:
        """The whole file, with right checksums."""
        start = struct.pack(">6I", 0x377F0682 | self.big_endian, 3007000, self.page_size, 0, *self.salts)
        sums = wal_checksum(start, 0, 0, big_endian=self.big_endian)
        parts = [start, struct.pack(">II", *sums)]
        for pgno, commit, page in self.frames:
            head = struct.pack(">II", pgno, commit)
            sums = wal_checksum(head + page, *sums, big_endian=self.big_endian)
            parts += [head, struct.pack(">4I", *self.salts, *sums), page]
        return b"".join(parts)

    @property
    def committed(self) -> int:
        """Number of frames up to the last commit frame."""
        return max((number for number, (_, commit, _) in enumerate(self.frames, 1) if commit), default=0)


@st.composite
def wal_files(draw: st.DrawFn, *, page_size: int | None = None, max_frames: int = 12) -> GeneratedWAL:
    """WAL files of any byte order, with transactions of any length; the last one may be without its commit frame."""
    size = page_size or draw(st.sampled_from([512, 1024, 4096]))
    rows = st.tuples(st.integers(1, 2**32 - 1), st.one_of(st.just(0), st.integers(1, 2**32 - 1)), page_images(size))
    return GeneratedWAL(size, (draw(_U32), draw(_U32)), draw(st.booleans()), tuple(draw(st.lists(rows, max_size=max_frames))))
