"""Random changes of files by what they are: tars by their headers, checkpoints by their archive and pickle."""

import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml

from osp.audit.fuzz.changes import DEEP, HOSTILE_TEXTS, change_bytes, change_json, change_value

_BLOCK = 512  # bytes of a tar's header
_KINDS = b"01234567LKxgSVDNMA\0\xff"
_SIZES = (0, 1, 511, 512, 513, 8**11 - 1, 1 << 33, 1 << 40, 1 << 62, 1 << 80, -1)
_PAX = (
    *((b"size", b"-1"), (b"size", b"99999999999999999999"), (b"path", b"\xff\xfe.mp4"), (b"path", b"../../x.mp4")),
    *((b"GNU.sparse.map", b"0,9999999999,1,1"), (b"GNU.sparse.major", b"1"), (b"GNU.sparse.size", b"1" * 30)),
    *((b"GNU.sparse.minor", b"0"), (b"mtime", b"nan"), (b"hdrcharset", b"BINARY"), (b"path", b"a/" * 5000 + b"b.mp4")),
)

_YAML = (
    *("a: *x", "x: &a [*a]", "!!python/object/apply:os.system [x]", "? [", "\ta: 1", "<<: {a: 1}"),
    *("- ", "${x", "a: ${a}", "${oc.env:HOME}: 1"),
)

# Names that readers of checkpoints let through, or may be tricked into letting through.
_GLOBALS = (
    *("numpy\nndarray", "numpy\ndtype", "numpy.core.multiarray\n_reconstruct", "numpy.core.multiarray\nscalar"),
    *("numpy._core.multiarray\n_reconstruct", "numpy._core.multiarray\nscalar", "numpy.dtypes\nFloat64DType"),
    *("argparse\nNamespace", "_io\nBytesIO", "io\nBytesIO", "collections\nOrderedDict", "torch\nSize", "torch\ndevice"),
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter", "torch\nFloatStorage", "torch\nfloat32"),
    *("torch._utils\n_rebuild_sparse_tensor", "torch._utils\n_rebuild_qtensor", "torch.serialization\n_get_layout"),
    *("torch._tensor\n_rebuild_from_type_v2", "torch._utils\n_rebuild_meta_tensor_no_storage", "torch\nTensor"),
    *(
        "torch.nn.parameter\nParameter",
        "torch._utils\n_rebuild_wrapper_subclass",
        "builtins\nset",
        "builtins\nbytearray",
    ),
    *("_codecs\nencode", "os\nsystem", "builtins\neval", "collections\nCounter", "torch.storage\nUntypedStorage"),
)
_OPCODES = (
    *(b"N", b"]", b"}", b")", b"\x85", b"\x86", b"\x87", b"(", b"t", b"l", b"d", b"R", b"b", b"\x81", b"0", b"2"),
    *(b"a", b"e", b"s", b"u", b"Q", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x94", b"1", b".", b"o", b"\x93"),
    *(b"K\0", b"K\7", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"h\0", b"h\5", b"q\3"),
    *(b"G\x7f\xf8" + bytes(6), b"X\3\0\0\0<f8", b"X\1\0\0\0O", b"C\x08AAAAAAAA", b"B\xff\xff\xff\x7f", b"X\1\0\0\0|"),
    *(b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x80\x05", b"\x95" + b"\xff" * 8, b"\x92", b"L1L\n", b"I01\n"),
    *(f"c{name}\n".encode() for name in _GLOBALS),
)


_ARGUMENTS = (
    *(b"N", b"K\1", b"K\0", b"J\xff\xff\xff\x7f", b"X\1\0\0\0O", b"X\2\0\0\0f8", b"X\3\0\0\0i8,", b"C\x08AAAAAAAA"),
    *(b"G@\0\0\0\0\0\0\0", b"\x88", b")", b"]", b"}", b"X\7\0\0\0storage", b"X\3\0\0\0cpu", b"X\1\0\0\x000"),
)


def change_file(draw: Random, path: Path) -> None:
    """Change a file in place, most often by what its suffix says that it is, else as mere bytes."""
    data = path.read_bytes()
    change = _CHANGES.get(path.suffix)
    path.write_bytes(change(draw, data) if change and draw.random() < 0.75 else change_bytes(draw, data))


def change_tar(draw: Random, data: bytes) -> bytes:
    """A tar with other headers, with members that are gone, doubled or made up, or cut off."""
    for _ in range(draw.randint(1, 2)):
        headers = _headers(data)
        if not headers:
            return change_bytes(draw, data)
        at = draw.choice(headers)
        kind = draw.randrange(8)
        if kind < 4:
            data = data[:at] + _changed_header(draw, data[at : at + _BLOCK]) + data[at + _BLOCK :]
        elif kind == 4:
            data = data[: draw.choice((at, at + draw.randrange(_BLOCK), at + _BLOCK + draw.randrange(_BLOCK)))]
        elif kind == 5:
            there = draw.choice(headers)
            data = data[:at] + data[there:]
        elif kind == 6:
            data = data[:at] + _member(draw) + data[at:]
        else:
            start = at + _BLOCK
            data = data[:start] + change_bytes(draw, data[start : start + _BLOCK]) + data[start + _BLOCK :]
    return data


def change_checkpoint(draw: Random, data: bytes) -> bytes:
    """A torch file with another pickle, or with entries of its archive that are gone, doubled, cut or renamed."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return change_pickle(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickled = next((number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl")), 0)
    kind = draw.random()
    number = pickled if kind < 0.7 else draw.randrange(len(entries))
    name, content = entries[number]
    if number == pickled and kind < 0.7:
        content = forged_pickle(draw) if kind < 0.15 else change_pickle(draw, content)
        entries[number] = name, content
    elif kind < 0.8:
        entries[number] = name, change_bytes(draw, content)
    elif kind < 0.85:
        del entries[number]
    elif kind < 0.9:
        entries.append((name, change_bytes(draw, content)))
    else:
        entries[number] = draw.choice(("archive/data/0", "x", "../x", name + "x", "archive/version")), content
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def change_pickle(draw: Random, data: bytes) -> bytes:
    """A pickle with opcodes that are gone, doubled, exchanged or others, and with other arguments."""
    pieces = _opcodes(data)
    if len(pieces) < 2:
        return change_bytes(draw, data)
    for _ in range(draw.randint(1, 3)):
        here, there = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        kind = draw.randrange(6)
        if kind == 0:
            del pieces[here]
        elif kind == 1:
            pieces.insert(here, pieces[there])
        elif kind == 2:
            pieces[here], pieces[there] = pieces[there], pieces[here]
        elif kind == 3:
            pieces[here : here + 1] = [draw.choice(_OPCODES) for _ in range(draw.randint(1, 3))]
        elif kind == 4:
            pieces.insert(here, draw.choice(_OPCODES))
        else:
            pieces[here] = pieces[here][:1] + change_bytes(draw, pieces[here][1:])
        if not pieces:
            return b""
    return b"".join(pieces)


def forged_pickle(draw: Random) -> bytes:
    """A pickle that calls names which readers let through, with arguments of all kinds, and gives a dictionary."""
    return b"\x80\x02}X\1\0\0\0x" + _forged(draw, 0) + b"s."


def change_safetensors(draw: Random, data: bytes) -> bytes:
    """A safetensors file with another header, or a header of another length."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    if draw.random() < 0.2:
        return draw.choice((0, 1, length - 1, length * 2, 1 << 40, (1 << 64) - 1)).to_bytes(8, "little") + header + rest
    changed = change_json(draw, header.decode()).encode("utf-8", "surrogatepass")
    return len(changed).to_bytes(8, "little") + changed + rest


def change_lines(draw: Random, data: bytes) -> bytes:
    """JSONL with other values in one line, or with lines that are gone, doubled or joined."""
    lines = data.split(b"\n")
    here = draw.randrange(max(len(lines) - 1, 1))
    kind = draw.random()
    if kind < 0.75:
        lines[here] = change_json(draw, lines[here].decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    elif kind < 0.8:
        del lines[here]
    elif kind < 0.85:
        lines.insert(here, lines[draw.randrange(len(lines))])
    elif kind < 0.9:
        lines.insert(here, DEEP.encode())
    else:
        return _change_text(draw, data)
    return b"\n".join(lines)


def _change_document(draw: Random, data: bytes) -> bytes:
    if draw.random() < 0.1:
        return _change_text(draw, data)
    return change_json(draw, data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def _change_yaml(draw: Random, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.15:
        return _change_text(draw, data)
    if kind < 0.3:
        lines = data.decode("utf-8", "replace").split("\n")
        line = draw.choice(
            ("a: *x", "x: &a [*a]", "!!python/object/apply:os.system [x]", "? [", "\ta: 1", "<<: {a: 1}")
        )
        lines.insert(draw.randrange(len(lines)), draw.choice((line, line, "- ", "${x", "a: ${a}", "${oc.env:HOME}: 1")))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    try:
        changed = change_value(draw, yaml.safe_load(data))
        text = json.dumps(changed) if kind < 0.4 else yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError, TypeError):
        return change_bytes(draw, data)
    return text.encode("utf-8", "surrogatepass")


def _change_text(draw: Random, data: bytes) -> bytes:
    """Text in other encodings, with other ends of lines, and with characters that are none."""
    text = data.decode("utf-8", "replace")
    kind = draw.randrange(7)
    if kind < 3:
        return text.encode(("utf-16", "utf-8-sig", "utf-16-be")[kind])
    if kind == 3:
        return text.encode("latin-1", "replace") + b"\xe9"
    if kind == 4:
        return text.replace("\n", draw.choice(("\r\n", "\r", "\0", "\u2028"))).encode()
    at = draw.randrange(len(text) + 1)
    return (text[:at] + draw.choice(HOSTILE_TEXTS) + text[at:]).encode("utf-8", "surrogatepass")


def _headers(data: bytes) -> list[int]:
    """Where the headers of a tar begin, as far as their sizes tell."""
    found, at = [], 0
    while at + _BLOCK <= len(data) and data[at : at + _BLOCK].strip(b"\0"):
        found.append(at)
        try:
            size = int(data[at + 124 : at + 136].strip(b"\0 ") or b"0", 8)
        except ValueError:
            break
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return found


def _changed_header(draw: Random, header: bytes) -> bytes:
    """The header with another field, and with a checksum that is right, most often."""
    changed = bytearray(header.ljust(_BLOCK, b"\0"))
    kind = draw.randrange(7)
    if kind == 0:
        _put_text(draw, changed, 0, 100)
    elif kind == 1:
        changed[124:136] = _size(draw.choice(_SIZES))
    elif kind == 2:
        changed[156] = draw.choice(_KINDS)
    elif kind == 3:
        _put_text(draw, changed, 345, 155)
    elif kind == 4:
        changed[257:265] = draw.choice((b"ustar  \0", b"ustar\x0000", bytes(8), draw.randbytes(8)))
    else:
        at = draw.randrange(_BLOCK)
        changed[at : at + 4] = draw.randbytes(4)[: _BLOCK - at]
    return _summed(changed) if draw.random() < 0.9 else bytes(changed)


def _put_text(draw: Random, header: bytearray, at: int, most: int) -> None:
    texts = ("caf\xe9.mp4", ".mp4", "a/.mp4", "x.txt", "x.json", "../../x.mp4", "/etc/x.mp4", "x" * 100, "a.mp4/", "")
    text = draw.choice((*texts, *HOSTILE_TEXTS[:8])).encode("latin-1", "replace")[:most]
    header[at : at + most] = text.ljust(most, b"\0")


def _size(size: int) -> bytes:
    if 0 <= size < 8**11:
        return b"%011o\0" % size
    return (b"\xff" * 12) if size < 0 else b"\x80" + size.to_bytes(11, "big")


def _summed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _member(draw: Random) -> bytes:
    """A member that is made up: a long name, extended headers, or a text with anything in it."""
    kind = draw.choice((b"L", b"K", b"x", b"g", b"0", b"0", b"S"))
    body = draw.choice((b"x" * 300, b"[" * 5000, b"caption \xff", b"", b'{"frames": NaN, "fps": 0, "caption": []}'))
    if kind in (b"x", b"g"):
        body = b"".join(_record(*draw.choice(_PAX)) for _ in range(draw.randint(1, 3)))
    header = bytearray(_BLOCK)
    header[:5] = b"m.%s" % draw.choice((b"txt", b"jso", b"mp4"))
    header[100:124], header[136:148] = b"0000644\0" + b"0000000\0" * 2, b"0" * 11 + b"\0"
    header[124:136] = _size(draw.choice((len(body),) * 4 + _SIZES))
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    return _summed(header) + body + bytes(-len(body) % _BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    """A line of a PAX header, which begins with its own length."""
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


def _opcodes(data: bytes) -> list[bytes]:
    """The pickle's opcodes with their arguments, as far as it can be read; the rest is the last piece."""
    starts: list[int] = []
    try:
        for _, _, at in pickletools.genops(data):
            starts.append(at or 0)
    except Exception:  # noqa: BLE001  (of a pickle that was changed before; what was read of it counts)
        starts.append(len(data))
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def _forged(draw: Random, depth: int) -> bytes:
    """The opcodes that put one value on the stack."""
    kind = draw.randrange(7 if depth < 4 else 2)
    if kind < 2:
        return draw.choice(_ARGUMENTS)
    if kind == 2:
        return b"c" + draw.choice(_GLOBALS).encode() + b"\n"
    arguments = b"(" + b"".join(_forged(draw, depth + 1) for _ in range(draw.randint(0, 4))) + b"t"
    if kind == 3:
        return arguments
    if kind == 4:
        return arguments + b"Q"  # a storage
    called = b"c" + draw.choice(_GLOBALS).encode() + b"\n" + arguments + draw.choice((b"R", b"R", b"\x81"))
    return called + (_forged(draw, depth + 1) + b"b" if kind == 6 else b"")


_CHANGES: dict[str, Callable[[Random, bytes], bytes]] = {
    ".tar": change_tar,
    ".ckpt": change_checkpoint,
    ".pt": change_checkpoint,
    ".safetensors": change_safetensors,
    ".jsonl": change_lines,
    ".json": _change_document,
    ".yaml": _change_yaml,
    ".txt": _change_text,
    ".csv": _change_text,
}
