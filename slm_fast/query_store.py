"""Queries on disk, so that a text is encoded once, whichever process asks for it."""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

FILE_NAME = "queries.sqlite3"
AT_ONCE = 500  # keys of a statement; SQLite takes 999 in its oldest builds


class QueryStore:
    """A folder of finished queries, [D] fp32 each, by text and by what encoded them; processes may share it.

    Args: folder: made if it is missing.  encoder: what identifies the encoder and its settings.
    Raises OSError where the folder cannot be used or its file is damaged.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self.path, self.encoder = Path(folder) / FILE_NAME, encoder
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._run("CREATE TABLE IF NOT EXISTS queries (key BLOB PRIMARY KEY, query BLOB) WITHOUT ROWID")

    def get(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The queries of those texts that are there."""
        keys = {self._key(text): text for text in texts}
        found: dict[str, Tensor] = {}
        ordered = list(keys)
        for lo in range(0, len(ordered), AT_ONCE):
            part = ordered[lo : lo + AT_ONCE]
            marks = ",".join("?" * len(part))
            for key, query in self._run(f"SELECT key, query FROM queries WHERE key IN ({marks})", part):
                found[keys[key]] = torch.frombuffer(bytearray(query), dtype=torch.float32)
        return found

    def put(self, queries: dict[str, Tensor]) -> None:
        rows = [(self._key(text), query.float().cpu().numpy().tobytes()) for text, query in queries.items()]
        self._run("INSERT OR IGNORE INTO queries VALUES (?, ?)", rows, many=True)

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.encoder}\0{text}".encode()).digest()

    def _run(self, statement: str, values: Sequence = (), many: bool = False) -> list:
        try:
            connection = sqlite3.connect(self.path, timeout=60)
            try:
                with connection:
                    run = connection.executemany if many else connection.execute
                    return run(statement, values).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise OSError(f"{self.path} cannot be used: {error}") from error
