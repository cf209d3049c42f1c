"""What has been done so far, on disk: one line of JSON for each thing that happens."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH, STEP, PROGRAM = "METAPOOL_JOURNAL", "METAPOOL_STEP", "METAPOOL_PROGRAM"
"""Environment of a program: where its journal is, and under which names it writes."""

Event = dict[str, Any]
"""With ``step``, ``program``, ``row`` and ``state``, and what belongs to that."""

PLANNED, BEGUN, DONE, FAILED, CUT = "planned", "begun", "done", "failed", "cut"
"""The states of a row. A failed one has ``why``, a done one its results; one is cut off when the
time of its step is over."""


@dataclass(frozen=True)
class Journal:
    """The journal as one program of one step writes it; many processes may do so at once."""

    path: Path
    step: str
    program: str

    @classmethod
    def of_environment(cls) -> "Journal | None":
        """That of a program which the runner has started."""
        if PATH not in os.environ:
            return None
        return cls(Path(os.environ[PATH]), os.environ[STEP], os.environ[PROGRAM])

    @property
    def environment(self) -> dict[str, str]:
        """From which a program finds it."""
        return {PATH: str(self.path.resolve()), STEP: self.step, PROGRAM: self.program}

    def write(self, row: str, state: str, **data: Any) -> None:
        """Append an event, in one piece."""
        event = {"step": self.step, "program": self.program, "row": row, "state": state}
        line = json.dumps(event | {"at": round(time.time(), 2)} | data) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def events(self) -> list[Event]:
        """What this program has written in this step."""
        return [
            event
            for event in read(self.path)
            if (event["step"], event["program"]) == (self.step, self.program)
        ]

    def tail(self) -> Iterator[bool]:
        """Whether this program has written anything since the last time, again and again."""
        place = self.path.stat().st_size if self.path.exists() else 0
        mine = json.dumps({"step": self.step, "program": self.program})[:-1].encode()
        while True:
            found = False
            if self.path.exists():
                with open(self.path, "rb") as file:
                    file.seek(place)
                    new = file.read()
                place += len(new)
                found = mine in new
            yield found

    def ended(self) -> set[str]:
        """Its rows that are over."""
        return {event["row"] for event in self.events() if event["state"] in (DONE, FAILED, CUT)}

    def has_begun(self) -> bool:
        """Whether it has come as far as its rows."""
        return any(event["state"] in (PLANNED, BEGUN) for event in self.events())

    def in_flight(self) -> str | None:
        """The row that has begun and is not over."""
        ended = self.ended()
        begun = [event["row"] for event in self.events() if event["state"] == BEGUN]
        return next((row for row in reversed(begun) if row not in ended), None)


def read(path: Path) -> Iterator[Event]:
    """All events; what was cut off while it was written is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        yield event
