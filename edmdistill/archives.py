"""Reads the files of torch.save and torch.jit.save without running anything in them.

The zip archives hold, in one top folder, pickles and the tensors' numbers, a member for each storage. torch's own
reader trusts them: a tensor could reach outside its storage, and a storage could be longer than its member.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from edmdistill.errors import INTACT
from edmdistill.pickles import FORGED, Budget, StandIn, Unpickler, Unreadable, empty_dict
from edmdistill.stored_tensors import (
    LEGACY_MAGIC,
    STORAGE_TYPES,
    Storage,
    StorageType,
    StoredTensor,
    mapped,
    rebuild_tensor,
)

MAX_MEMBERS = 2**16
MAX_PACKED = 2**25
"""Largest size of all compressed members, unpacked: torch compresses only source text."""


class Archive:
    """A zip archive of torch, whose members go by their names below its top folder.

    Raises: Unreadable: it is empty, damaged, encrypted, or not written by torch.  OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.data = mapped(path)
        if bytes(self.data[:2]) != b"PK":
            raise Unreadable(
                "is not a zip archive, which torch.save writes since 1.6: give the file as its authors publish it, or "
                "write it by torch.save again"
            )
        self.budget = Budget(len(self.data))
        try:
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise Unreadable("is a zip archive that is cut short or damaged: download it again") from error
        members = self.zip.infolist()
        if any(member.filename.lower().endswith((".png", "dataset.json")) for member in members):
            raise Unreadable("is a data set and no checkpoint: `edmdistill data inspect` shows it")
        if len(members) > MAX_MEMBERS:
            raise Unreadable(f"is a zip archive of {len(members):,} members, which no checkpoint has: {INTACT}")
        for member in members:
            if member.flag_bits & 0x1:
                raise Unreadable("is an encrypted zip archive: unpack it with its password and write it by torch.save")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Unreadable(
                    f"is a zip archive packed by method {member.compress_type}, which torch does not write: give the "
                    "file as torch.save wrote it"
                )
        packed = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
        if packed > MAX_PACKED:
            raise Unreadable(
                f"is a zip archive that unfolds to {packed:,} bytes, but torch does not compress weights: give the "
                "file as torch.save wrote it"
            )
        # torch looks names up case-insensitively.
        self.members = {member.filename.partition("/")[2].lower(): member for member in members}
        tops = {member.filename.partition("/")[0] for member in members}
        if len(tops) != 1 or len(self.members) != len(members):
            raise Unreadable(
                f"is a zip archive of {', '.join(repr(member.filename[:60]) for member in members[:4]) or 'nothing'}, "
                "not one that torch.save or torch.jit.save wrote: give the checkpoint file inside it, or another"
            )

    def read(self, name: str) -> memoryview:
        """Returns the bytes of a member, as a view of the file unless it is compressed.

        Raises: Unreadable: there is no such member, or it is damaged.
        """
        member = self.members.get(name.lower())
        if member is None:
            raise Unreadable(f"is a zip archive without {name}: it is damaged, or not a file of torch; {INTACT}")
        if member.compress_type != zipfile.ZIP_STORED:
            try:
                return memoryview(self.zip.read(member))
            except Exception as error:  # zipfile passes on what zlib and its own parsing raise
                raise Unreadable(f"holds {name} damaged: download it again") from error
        try:
            header = struct.unpack_from("<4s22xHH", self.data, member.header_offset)
        except struct.error:
            header = (b"", 0, 0)
        start = member.header_offset + 30 + header[1] + header[2]
        if header[0] != b"PK\x03\x04" or not 0 <= start <= start + member.file_size <= len(self.data):
            raise Unreadable(f"holds {name} damaged: download it again")
        return self.data[start : start + member.file_size]

    def load(self, name: str, folder: str, names: Mapping[tuple[str, str], object]) -> object:
        """Returns the value of a pickle; its tensors are StoredTensors, or None where they are empty.

        Args:
            name: of the member that is the pickle.
            folder: of the members that are its storages.
            names: stand-ins for what the pickle may ask for beside tensors; see Unpickler.
        Raises: Unreadable: it is damaged, or asks for something else.
        """

        def resolve(identifier: object) -> Storage:
            match identifier:
                case ("storage", StorageType() as kind, str() as key, str(), int() as numel, *_):
                    data = self.read(f"{folder}/{key}")
                    if len(data) != numel * kind.itemsize:
                        raise Unreadable(
                            f"declares {numel:,} {kind.dtype} numbers where it holds {len(data):,} bytes: {FORGED}"
                        )
                    return Storage(kind.dtype, numel, data)
            raise TypeError

        known = {**STORAGE_TYPES, **_TENSORS, **names}
        return Unpickler(self.read(name), known, resolve, self.budget, (str, int)).run()


def _rebuild(storage: object, offset: int, shape: object, *rest: object) -> StoredTensor | None:
    """Returns what rebuild_tensor does, but None for an empty tensor."""
    if isinstance(shape, tuple) and 0 in shape:
        return None
    return rebuild_tensor(storage, offset, shape, *rest)


_TENSORS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): StandIn(empty_dict),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(_rebuild),
    ("torch._utils", "_rebuild_parameter"): StandIn(lambda tensor, *_: tensor),
}


def load_legacy(data: memoryview, names: Mapping[tuple[str, str], object]) -> object:
    """Returns the value in a file of torch.save before torch 1.6; its tensors are StoredTensors.

    Such a file is five pickles (a magic number, the format's version, facts about the machine, the value, the keys of
    its storages), and then each storage as the count of its numbers and the numbers.

    Args:
        names: stand-ins for what the value may ask for beside tensors; see Unpickler.
    Raises: Unreadable: it is damaged, or asks for something else.
    """
    storages: dict[str, Storage] = {}

    def resolve(identifier: object) -> Storage:
        match identifier:
            case ("storage", StorageType() as kind, str() as key, str(), int() as numel, None):
                return storages.setdefault(key, Storage(kind.dtype, numel, memoryview(b"")))
        raise TypeError

    machine = Unpickler(data, {**STORAGE_TYPES, **_TENSORS, **names}, resolve, keys=(str, int))
    magic, version, system = machine.run(), machine.run(), machine.run()
    if magic != LEGACY_MAGIC or version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise Unreadable("is not a file of torch.save on a little-endian machine: write it by torch.save again")
    start = machine.position
    machine.run()  # declares the storages, whose numbers come after it
    end, keys = machine.position, machine.run()
    if not isinstance(keys, list) or {*map(str, keys)} != storages.keys() or len(keys) != len(storages):
        raise Unreadable(f"declares other storages than it holds: {FORGED}")
    for key in keys:
        storage, numel = storages[key], machine.unsigned(8)
        if numel != storage.numel:
            raise Unreadable(f"declares {storage.numel:,} numbers where it holds {numel:,}: {FORGED}")
        storages[key] = Storage(storage.dtype, numel, machine.take(numel * storage.itemsize))
    machine.position = start
    value = machine.run()
    assert machine.position == end
    return value
