"""What the parts of a visit share: device, time, and the file of their findings."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tritonq.perf.gpu.results import RESULTS, append, read

_ERROR_LENGTH = 400
# Exit status of a part whose process can do no more on the device: what is left of the part runs in a new one.
DEVICE_FAULT = 75


@dataclass
class Visit:
    """One part of a visit: where it runs, how long, and where its findings go.

    Attributes:
        part: name of the part that runs.
        device: where it runs; a CPU tries the code without measuring anything of interest.
        out: folder of the results.
        seconds: how long the part may take.
        small: small shapes, for a trial.
    """

    part: str
    device: torch.device
    out: Path
    seconds: float
    small: bool = False
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds that remain."""
        return self.seconds - (time.monotonic() - self.start)

    def note(self, name: str, status: str = "ok", **fields: Any) -> None:
        """Write a finding to the results at once, and print it."""
        at = round(time.monotonic() - self.start, 1)
        append(self.out / RESULTS, {"part": self.part, "name": name, "status": status, **fields, "at_s": at})
        print(f"{self.part} {name}: {status}", *(f"{key}={value}" for key, value in fields.items()), flush=True)

    @contextmanager
    def finding(self, name: str) -> Iterator[None]:
        """Turn an exception in the block into a finding called ``name``, so that what comes after the block still runs.

        Raises:
            SystemExit: with `DEVICE_FAULT`, if nothing else can run on the device in this process.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(name, "error", error=f"{type(error).__name__}: {error}"[:_ERROR_LENGTH])
            if is_lost(self.device):
                raise SystemExit(DEVICE_FAULT) from error

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def has_time_for(self, name: str, seconds: float) -> bool:
        """Whether ``seconds`` remain; if not, that is noted as a finding.

        Also False for what this part found before a fault of the device ended its process.
        """
        if any((record["part"], record["name"]) == (self.part, name) for record in read(self.out / RESULTS)):
            return False
        if self.left() >= seconds:
            return True
        self.note(name, "not run", reason=f"{self.left():.0f} s were left, it takes about {seconds:.0f}")
        return False


def is_lost(device: torch.device) -> bool:
    """Whether the device refuses all further work of this process, as after an invalid access to memory."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
