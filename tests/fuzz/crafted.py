"""Build files of PyTorch from a program of bytes, so that changes to the program change structure.

Changes to a valid file rarely make ten thousand tensors share a storage, a dictionary hold itself
or a thousand members point to the same bytes. Here each byte is such a step.
"""

import io
import zipfile

_CLAIMS = (0, 1, 4, 16, 1 << 10, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 4000)
_NAMES = ("running_var", "bn.running_var", "bn.running_mean", "a.weight", "state", "param_groups")
_OBJECTS = (b"cargparse\nNamespace\n)\x81", b"ccollections\nOrderedDict\n)R", b"cos\nsystem\n)R")
_MODULE = b"ctorch.nn\nModule\n)\x81"
_SCRIPT = b"c__torch__\nNet\n)\x81"


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + len(raw).to_bytes(4, "little") + raw


def _tensor(key: int, count: int, size: int, stride: int, kind: int) -> bytes:
    named = (b"Float", b"BFloat16", b"Half", b"Long", b"QInt8")[kind % 5]
    storage = b"(" + _text("storage") + b"ctorch\n" + named + b"Storage\n" + _text(str(key))
    storage += _text("cpu") + _number(count) + b"tQ"
    place = _number(0) + b"(" + _number(size) + b"t(" + _number(stride) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89NtR"


def torch_file(program: bytes) -> bytes:
    """A zip as torch.save writes it, of tensors, dictionaries and members as `program` says."""
    steps = iter(program)

    def take(limit: int) -> int:
        return next(steps, 0) % limit

    made, open_ones, again = b"}", 0, 0
    members = overlapping = 0
    for keys, step in enumerate(steps):
        key = _text(f"{keys}.{_NAMES[take(len(_NAMES))]}" if step & 16 else _NAMES[take(6)])
        match step % 12:
            case 0 | 1:
                claims = [_CLAIMS[take(len(_CLAIMS))] for _ in range(3)]
                made += key + _tensor(take(8), *claims, kind=take(5)) + b"q" + bytes([again]) + b"s"
            case 2:  # the same again, under many names
                for i in range(take(256)):
                    made += _text(f"{i}.running_var") + b"h" + bytes([again]) + b"s"
            case 3:
                made, open_ones = made + key + b"}", open_ones + 1
            case 4 if open_ones:
                made, open_ones = made + b"s", open_ones - 1
            case 5:
                made += key + _OBJECTS[take(3)] + b"}" + _text("x") + b"h" + bytes([again]) + b"sbs"
            case 6:
                made += key + b"]" * take(200) + b"N" + b"s"
            case 7:
                members += take(256)
            case 8:
                overlapping += take(256)
            case 9:  # a module, with itself for a part
                names = [_text(n) + b"}" for n in ("_parameters", "_buffers")]
                made += key + _MODULE + b"q\xfe}" + b"s".join(names) + b"s" + _text("_modules")
                made += b"}" + _text("bn") + b"h\xfes" + b"ssb" + b"s"
            case 10:
                made += key + _SCRIPT + b"}" + _text("running_var") + b"h" + bytes([again]) + b"sbs"
            case _:
                again = take(4)
                made += _text("0") + b"Nq" + bytes([again]) + b"s"
    made += b"s" * open_ones + b"."
    return _zipped(b"\x80\x02" + made, members, overlapping)


def _zipped(pickled: bytes, members: int, overlapping: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("x/data.pkl", pickled)
        for i in range(8 + members):
            z.writestr(f"x/data/{i}", bytes(64))
        first = z.getinfo("x/data/0")
        for i in range(overlapping):
            info = zipfile.ZipInfo(f"x/data/{8 + members + i}")
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.compress_size, info.file_size = first.compress_size, first.file_size
            z.filelist.append(info)
    return buffer.getvalue()
