"""One save as Orbax's files, written and read by the processes of one mesh alone.

``ocp.Checkpointer`` would do so for all processes: the names under which it waits, and tells the others of directories,
are those of every save, and where one process fails the others wait for 300 s. So its steps are taken here, and
``together`` says after each of them how it went on every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint.path import atomicity_defaults

from jax_models.processes import processes_of, together
from loaders.writing.directory_lock import Claim

WEIGHTS, DOCUMENT = "weights", "model"  # Orbax's items
QUIET_S, MOST_S = 0.5, 10.0  # that nothing comes any more in the directory of a failed save; that this is waited for
CHUNK_BYTES = 4 << 20  # read and unpacked whole by everybody who wants any part of it
ABOUT = "_CHECKPOINT_METADATA"  # for Orbax alone: times, and what reads each item


def write(
    where: str,
    mesh: Mesh | None,
    arrays: dict[str, jax.Array],
    document: dict[str, Any],
    stacks: Collection[str] = (),
) -> None:
    """Arrays and a JSON document to a new directory, which is there once all of it is.

    All processes of the mesh call this and no other one; what one of them cannot do is at once an error on all.

    Args:
        where: the directory, which all of them see; not there yet.
        mesh: where the arrays lie; None: on this process.
        arrays: by parameter name, each written by the processes that hold its shards, in its dtype.
        document: what JSON can say; the same on all.
        stacks: names of those that are read by the entries of their first axis, so of experts.
    Raises:
        OSError: it cannot be written, on the process where that is so; FileNotFoundError: not all see one directory;
            FileExistsError: another save was first, or is at it.
        RuntimeError: on the others.
    """
    path, primary = epath.Path(where), processes_of(mesh)[0]
    store = ocp.metadata.metadata_store(enable_write=True, blocking_write=True)
    kind = atomicity_defaults.get_default_temporary_path_class(path)
    temporary = kind.from_final(path, checkpoint_metadata_store=store)
    cut = {name: _chunks(array, is_stack=name in stacks) for name, array in arrays.items()}
    args = {WEIGHTS: ocp.args.PyTreeSave(arrays, save_args=cut), DOCUMENT: ocp.args.JsonSave(document)}
    claim = None if "://" in where else Claim(Path(where), Path(temporary.get()))  # stores have no locks

    with _handlers(primary) as handlers:

        def begin() -> None:
            if jax.process_index() != primary:
                return
            with _named(where):
                if claim is None:
                    _run(temporary.create())
                else:
                    claim.take()
                    store.write(temporary.get() / ABOUT, {"init_timestamp_nsecs": time.time_ns()})
                for item in handlers:
                    (temporary.get() / item).mkdir()

        def write_ours() -> None:
            for item, handler in handlers.items():
                if not (directory := temporary.get() / item).exists():
                    raise FileNotFoundError(f"{directory} is not here. Save to a directory that all processes share.")
                with _named(directory):
                    handler.save(directory, args=args[item])

        def finish() -> None:
            if jax.process_index() == primary:
                with _named(where):
                    for item, handler in handlers.items():
                        handler.finalize(temporary.get() / item)
                    kinds = {item: handler.typestr() for item, handler in handlers.items()}
                    store.update(temporary.get() / ABOUT, item_handlers=kinds)
                    _run(temporary.finalize())

        try:
            for step in (begin, write_ours, finish):
                together(mesh, step)
        except BaseException as error:
            # nobody writes any more; of an interrupt, others know nothing
            is_over = isinstance(error, Exception) or len(processes_of(mesh)) == 1
            is_ours = jax.process_index() == primary and (claim is None or claim.is_held)
            if is_over and is_ours:  # else a full disk would stay full
                with contextlib.suppress(Exception):
                    _remove(temporary.get())
            raise
        finally:
            if claim is not None:
                claim.release()


def _chunks(array: jax.Array, *, is_stack: bool) -> ocp.SaveArgs:
    """How an array is cut on disk: by default not at all but by its shards, and each process would read all of one.

    The smaller are whole. Of the larger Orbax halves the longer axes, but few of experts.
    """
    by_entry = is_stack and array.nbytes > CHUNK_BYTES
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if by_entry else ())


@contextlib.contextmanager
def _named(place: epath.PathLike) -> Iterator[None]:
    """Errors of whatever a file system refuses are OSErrors that name the place; TensorStore's are ValueErrors."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{place} cannot be written: {str(error).partition(chr(10))[0]}") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error


def _remove(directory: epath.Path) -> None:
    """Remove what a failed save began, also what TensorStore, which goes on for a moment, makes there again.

    The next save is written under the same name, and must not find anything of this one; nor may it begin meanwhile, so
    the directory itself, which is locked, goes last.
    """
    until, seen = time.monotonic() + MOST_S, time.monotonic()
    while time.monotonic() < min(until, seen + QUIET_S):
        for path in list(directory.iterdir()):
            seen = time.monotonic()
            with contextlib.suppress(OSError):  # a file came while it was removed
                path.rmtree(missing_ok=True) if path.is_dir() else path.unlink(missing_ok=True)
        time.sleep(0.02)
    directory.rmtree(missing_ok=True)


class UnreadableArrays(Exception):
    """What was raised over each array that cannot be read, by its name."""

    def __init__(self, errors: dict[str, BaseException]) -> None:
        super().__init__(f"{len(errors)} arrays, the first {next(iter(errors))!r}")
        self.errors = errors


def read_arrays(where: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of a save; waits for no other process, which may have failed.

    Args:
        where: its directory.
        wanted: by name, of which shape and dtype each is to be, and where: the parts that lie here are read.
    Raises:
        UnreadableArrays: some cannot be read, and which.
        Exception: whatever else Orbax raises over files that are damaged or not there.
    """
    args = ocp.args.PyTreeRestore(wanted, ocp.checkpoint_utils.construct_restore_args(wanted))
    with _handlers(jax.process_index()) as handlers:
        return handlers[WEIGHTS].restore(epath.Path(where) / WEIGHTS, args=args)


def read_document(where: str) -> Any:
    """Raises ValueError for what Orbax did not finish, and whatever else comes of reading no save."""
    if ocp.utils.is_tmp_checkpoint(where):
        raise ValueError("it was not finished")
    with _handlers(jax.process_index()) as handlers:
        return handlers[DOCUMENT].restore(epath.Path(where) / DOCUMENT, args=ocp.args.JsonRestore())


class _Shards:
    """An array as its shards, which is no ``jax.Array``."""

    def __init__(self, array: jax.Array) -> None:
        self._array = array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Also saves arrays that lie on one of several processes, which Orbax refuses as a mistake; reads all it can."""

    async def serialize(self, values: Sequence[jax.Array], infos: Any, args: Any = None) -> Any:
        shards: Any = [_Shards(array) for array in values]
        return await super().serialize(shards, infos, args)

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        """Each array by itself, so that all that fail are known; Orbax would end with the first.

        Each would then print its own error once Orbax's loop has ended, so what was begun is waited for. Not cancelled,
        for TensorStore says so to the loop from a thread of its own, at a time that nobody knows.
        """
        before, read = asyncio.all_tasks(), super().deserialize
        each = [read([info], [arg]) for info, arg in zip(infos, args or (), strict=True)]
        found: list[Any] = await asyncio.gather(*each, return_exceptions=True)
        if errors := {
            str(info.name): one for info, one in zip(infos, found, strict=True) if isinstance(one, BaseException)
        }:
            while begun := asyncio.all_tasks() - before:
                await asyncio.gather(*begun, return_exceptions=True)
            raise UnreadableArrays(errors)
        return [array for (array,) in found]


@contextlib.contextmanager
def _handlers(primary: int) -> Iterator[dict[str, Any]]:
    # by default the copies of an array are cut, and each writes a piece, for which every shape compiles a program
    arrays = _ArrayHandler(primary_host=primary, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    options = ocp.options.MultiprocessingOptions(primary_host=primary)
    handlers = {
        WEIGHTS: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options),
        DOCUMENT: ocp.JsonCheckpointHandler(multiprocessing_options=options),
    }
    try:
        yield handlers
    finally:
        for handler in handlers.values():
            handler.close()


def _run(work: Coroutine[Any, Any, Any]) -> None:
    """In a thread of its own: a notebook has a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()
