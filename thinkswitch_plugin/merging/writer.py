"""A writer for mergekit that puts each tensor on disk as it comes, in constant memory.

mergekit's `TensorWriter` keeps a whole shard (5 GB by default) in memory and writes it at
the shard's end. This one copies a tensor into a few aligned buffers that a thread writes
beside the computation, past the page cache where the file system allows it, so that the
checkpoints being read stay cached. The header of a safetensors file stands before the
data, so room is kept for it and the rest filled with spaces, as the format permits.

mergekit has no option for a writer; `merging/run.py` puts this class in the place of
the name `TensorWriter` in `mergekit.io.tasks`. With such an option upstream, the swap goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import queue
import struct
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from mergekit.io.tensor_writer import TensorWriter

from thinkswitch_plugin.merging.kernel import all_finite, workers
from thinkswitch_plugin.merging.layout import Stored

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEADER = 2**18  # bytes kept for a shard's header, about 2000 tensors; a shard that needs more ends early
BUFFER = 2**24  # bytes
BUFFERS = 6
BLOCK = 4096  # what direct writes must be multiples of
PIECE = 2**20  # elements copied and checked at once
SYNC = 2**28  # bytes after which written data is pushed to the disk where the page cache is in between


class NonFiniteOutputError(ValueError):
    """A tensor about to be written holds NaN or infinity; `name` is its name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} holds NaN or infinity")
        self.name = name


class ShardFile:
    """One safetensors file being written from front to back by a thread.

    Args:
        path: the file to create.
        buffers: free buffers of `BUFFER` bytes, shared by all files of a writer.
        thread: one thread; it writes the buffers in order.
    """

    def __init__(self, path: Path, buffers: queue.Queue[mmap.mmap], thread: ThreadPoolExecutor) -> None:
        self.size = 0  # bytes of tensor data
        self.entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        self._header_length = len(json.dumps(self.entries))
        self._buffers, self._thread = buffers, thread
        self._flying: deque[Future[None]] = deque()
        self._buffer = buffers.get()
        self._filled = 0
        self._position = HEADER
        self._unsynced = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._file, self._direct = os.open(path, flags | os.O_DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file, self._direct = os.open(path, flags, 0o666), False

    def has_room(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the header has room for one more tensor, and the tensor would be aligned to its elements."""
        needed = len(json.dumps({name: self._entry(tensor)})) + 2
        return self._header_length + needed <= HEADER - 8 and self.size % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one contiguous CPU tensor; returns once it is copied. Raises `NonFiniteOutputError`."""
        entry = self._entry(tensor)
        flat = tensor.reshape(-1)
        size = tensor.element_size()
        start, count = 0, flat.numel()
        while start < count:
            # An element may straddle two buffers only if sizes were odd; they are powers of two.
            part = flat[start : start + (BUFFER - self._filled) // size]
            room = torch.frombuffer(self._buffer, dtype=torch.uint8, count=part.numel() * size, offset=self._filled)
            if not all(workers().map(_copy, room.split(PIECE * size), part.split(PIECE))):
                raise NonFiniteOutputError(name)
            start += part.numel()
            self._filled += part.numel() * size
            if self._filled == BUFFER:
                self._flush()
        self.entries[name] = entry
        self._header_length += len(json.dumps({name: entry})) + 2
        self.size += count * size

    def close(self) -> None:
        """Write what is left and the header, and wait until all of it is on disk."""
        end = HEADER + self.size
        if self._filled:
            self._flush()
        header = json.dumps(self.entries, separators=(",", ":")).encode()
        self._buffer[:HEADER] = struct.pack("<Q", HEADER - 8) + header.ljust(HEADER - 8)
        self._position, self._filled = 0, HEADER
        self._flush()
        self._buffers.put(self._buffer)
        while self._flying:
            self._flying.popleft().result()
        os.ftruncate(self._file, end)
        os.fsync(self._file)
        os.close(self._file)

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        offsets = [self.size, self.size + tensor.numel() * tensor.element_size()]
        return {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}

    def _flush(self) -> None:
        while self._flying and self._flying[0].done():
            self._flying.popleft().result()
        length = -(-self._filled // BLOCK) * BLOCK
        self._flying.append(self._thread.submit(self._write, self._buffer, length, self._position))
        self._position += self._filled
        self._buffer, self._filled = self._buffers.get(), 0

    def _write(self, buffer: mmap.mmap, length: int, position: int) -> None:
        try:
            view = memoryview(buffer)[:length]
            while view:
                try:
                    written = os.pwrite(self._file, view, position)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    # A file system that opens for direct writes and then refuses them.
                    self._direct = False
                    fcntl.fcntl(self._file, fcntl.F_SETFL, 0)
                    continue
                view, position = view[written:], position + written
                self._unsynced += written
            if not self._direct and self._unsynced >= SYNC:
                os.fdatasync(self._file)
                self._unsynced = 0
        finally:
            self._buffers.put(buffer)


class StreamingWriter(TensorWriter):  # type: ignore[misc]
    """mergekit's writer with its interface, file names and index, but no shard in memory.

    Each tensor is checked to be finite before it is written. `--async-write` and
    `--write-threads` change nothing: writing is always done beside the computation.
    """

    def __init__(
        self,
        out_path: str,
        max_shard_size: int,
        override_basename: str | None = None,
        carried: Mapping[str, Stored] | None = None,
    ) -> None:
        self._carried = carried or {}
        super().__init__(out_path, max_shard_size=max_shard_size, override_basename=override_basename)
        self._thread = ThreadPoolExecutor(1)
        self._buffers: queue.Queue[mmap.mmap] = queue.Queue()
        for _ in range(BUFFERS):
            self._buffers.put(mmap.mmap(-1, BUFFER))
        self._shard: ShardFile | None = None
        self._saving = threading.Lock()

    def save_tensor(self, name: str, tensor: torch.Tensor, clone: bool = False) -> None:
        """Append a tensor to the shard, or to a new one where it would exceed the shard's size."""
        tensor = tensor.detach().cpu().contiguous()
        with self._saving:
            size = tensor.numel() * tensor.element_size()
            shard = self._shard
            full = shard is not None and 0 < self.max_shard_size < shard.size + size and shard.size > 0
            if shard is not None and (full or not shard.has_room(name, tensor)):
                shard.close()
                shard = None
            if shard is None:
                self.shards_written += 1
                shard = ShardFile(Path(self.out_path) / self._shard_name(), self._buffers, self._thread)
            self._shard = shard
            shard.add(name, tensor)
            self.weight_map[name] = self._shard_name()
            self.total_size += size

    def finalize(self) -> None:
        """Add the carried tensors and close the last shard; mergekit's own method names the shards and writes the index."""
        for name, stored in self._carried.items():
            self.save_tensor(name, stored.read())
        with self._saving:
            if self._shard is not None:
                self._shard.close()
                self._shard = None
            self._thread.shutdown()
        super().finalize()

    def _shard_name(self) -> str:
        prefix, extension = self._get_name_components()
        return f"{prefix}-{self.shards_written}.{extension}"


def writer(
    out_path: str,
    max_shard_size: int = 5 * 10**9,
    override_basename: str | None = None,
    carried: Mapping[str, Stored] | None = None,
    **_: Any,
) -> StreamingWriter:
    """What stands in the place of mergekit's class; its further options change nothing here.

    Args:
        carried: tensors to write as they are, beside those that mergekit computes.
    """
    return StreamingWriter(out_path, max_shard_size, override_basename, carried)


def _copy(room: torch.Tensor, part: torch.Tensor) -> bool:
    room.copy_(part.view(torch.uint8))
    if not part.is_floating_point():
        return True
    if part.element_size() == 1:
        part = part.float()
    # A sum is quick and not finite if any term is not; it may also overflow, so then look closely.
    return bool(torch.isfinite(part.sum())) or all_finite(part)
