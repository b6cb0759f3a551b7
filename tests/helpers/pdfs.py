"""PDFs written byte by byte: what Pillow cannot write, encrypted and hostile ones among them."""
import hashlib

LETTER = b"/MediaBox[0 0 612 792]"
RED = b"1 0 0 rg 0 0 50 50 re f"            # a square at the lower left
# What the specification fills short passwords up with (ISO 32000-1, 7.6.3.3).
PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def stream(content: bytes, entries: bytes = b"") -> bytes:
    return b"<</Length %d%s>>stream\n%s\nendstream" % (len(content), entries, content)


def pdf_bytes(*pages: tuple[bytes, bytes], objects: dict[int, bytes] | None = None,
              catalog: bytes = b"", trailer: bytes = b"") -> bytes:
    """A PDF of pages, each its dictionary's entries and its content. objects: further ones, by
    their numbers from 1000 on; catalog and trailer: further entries of these."""
    found = {1: b"<</Type/Catalog/Pages 2 0 R%s>>" % catalog, **(objects or {})}
    for i, (entries, content) in enumerate(pages):
        found[3 + 2 * i] = b"<</Type/Page/Parent 2 0 R/Contents %d 0 R%s>>" % (4 + 2 * i, entries)
        found[4 + 2 * i] = stream(content)
    kids = b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(pages)))
    found[2] = b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(pages))
    data = b"%PDF-1.7\n"
    lines = [b"0000000000 65535 f \n"] * (1 + max(found))
    for number, content in found.items():
        lines[number] = b"%010d 00000 n \n" % len(data)
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    return data + (b"xref\n0 %d\n%strailer<</Root 1 0 R/Size %d%s>>\nstartxref\n%d\n%%%%EOF"
                   % (len(lines), b"".join(lines), len(lines), trailer, len(data)))


def rc4(key: bytes, data: bytes) -> bytes:
    state = list(range(256))
    j = 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out = bytearray()
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def encrypted_pdf(user: bytes, owner: bytes = b"owner") -> bytes:
    """A page with RED, encrypted by the standard's first method (40 bits of RC4). An empty user
    password is one that no reader asks for."""
    name, allowed = b"0123456789abcdef", -4
    owned = rc4(hashlib.md5((owner + PADDING)[:32]).digest()[:5], (user + PADDING)[:32])
    seed = (user + PADDING)[:32] + owned + allowed.to_bytes(4, "little", signed=True) + name
    key = hashlib.md5(seed).digest()[:5]
    of_content = hashlib.md5(key + (4).to_bytes(3, "little") + bytes(2)).digest()[:10]
    trailer = (b"/ID[<%s><%s>]/Encrypt<</Filter/Standard/V 1/R 2/P %d/O<%s>/U<%s>>>"
               % (name.hex().encode(), name.hex().encode(), allowed, owned.hex().encode(),
                  rc4(key, PADDING).hex().encode()))
    return pdf_bytes((LETTER, rc4(of_content, RED)), trailer=trailer)


def nested_forms(levels: int, fan: int = 10) -> bytes:
    """A page of fan ** levels squares in a few hundred bytes: a drawing in a drawing in ..."""
    objects = {}
    for level in range(levels):
        content = RED if level == levels - 1 else b"/F Do " * fan
        entries = (b"/Type/XObject/Subtype/Form/BBox[0 0 600 600]/Resources<</XObject<</F %d 0 R>>"
                   b">>" % (1001 + level))
        objects[1000 + level] = stream(content, entries)
    return pdf_bytes((LETTER + b"/Resources<</XObject<</F 1000 0 R>>>>", b"/F Do"),
                     objects=objects)
