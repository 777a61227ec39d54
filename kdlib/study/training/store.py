"""Finished and interrupted runs, one folder for each fingerprint. An accelerator, never a source: deleting it loses nothing finished."""

import configparser
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kdlib.files import folder_bytes

METRICS = "metrics.json"  # written last: a run is finished when it is there
RUNS, ANSWERS = "kdlib-runs", "kdlib-answers"
FILES = (METRICS, "curve.csv", "timing.json", "environment.json", "weights.safetensors")


class Store:
    """Beside the DVC cache, so that ``dvc exp run --temp`` and ``--queue``, which see no ignored files, share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, fingerprint: str) -> Path:
        """The folder of a run, made if need be."""
        folder = self.folder / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, fingerprint: str) -> bool:
        return all((self.folder / fingerprint / name).is_file() for name in FILES)

    @contextmanager
    def claim(self, fingerprints: Iterable[str]) -> Iterator[None]:
        """Hold these runs alone. Waits for another process that holds one, and says so. A killed process holds nothing."""
        with ExitStack() as held:
            for fingerprint in sorted(set(fingerprints)):  # one order for all: no two processes wait for each other
                lock = self._lock(fingerprint)
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    print(f"run {fingerprint} is being trained by another process: waiting for it", file=sys.stderr, flush=True)
                    held.enter_context(lock.acquire())
            yield

    def export(self, fingerprint: str, folder: Path) -> None:
        """Copy a finished run's files to where the pipeline expects them, each whole or not at all; metrics.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        averages = sorted(path.name for path in (self.folder / fingerprint).glob("weights_*.safetensors"))
        for name in (*averages, *reversed(FILES)):
            temporary = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                shutil.copyfile(self.folder / fingerprint / name, temporary)
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Bytes on disk for each fingerprint."""
        return {run.name: folder_bytes(run) for run in sorted(self.folder.glob("*")) if run.is_dir()}

    def remove(self, fingerprint: str) -> bool:
        """Delete one run; False, and nothing done, while a process holds it."""
        with suppress(Timeout), self._lock(fingerprint).acquire(timeout=0):
            if (self.folder / fingerprint).is_dir():  # not removed by another process just now
                shutil.rmtree(self.folder / fingerprint)
            return True
        return False

    def _lock(self, fingerprint: str) -> FileLock:
        """Beside the run, not in it: a process that waits for the lock must find it after another has removed the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{fingerprint}.lock")


def project(root: Path) -> Path:
    """The project that the study at ``root`` belongs to: the nearest folder at or above it that DVC knows; without one, ``root``."""
    return next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), root)


def dvc_cache(root: Path) -> Path:
    """The DVC cache of a study's project, wherever its configuration (.dvc/config, .dvc/config.local) puts that."""
    folder = project(root) / ".dvc"
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([folder / "config", folder / "config.local"], encoding="utf-8")
    return (folder / Path(settings.get("cache", "dir", fallback="cache").strip("'\"")).expanduser()).resolve()


def beside_dvc_cache(root: Path, name: str = RUNS) -> Path:
    """Where the runs, or the ANSWERS, of a study's project are kept: in one place for all its studies, so that they share them."""
    return dvc_cache(root).parent / name
