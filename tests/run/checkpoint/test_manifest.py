"""The manifest: round trip, and whatever a stranger writes in one is refused, never believed."""

from __future__ import annotations

import contextlib
import copy
import json
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import StorageError
from meshwright.run.checkpoint.manifest import (
    ITEM_BYTES,
    Entry,
    File,
    Manifest,
    Stored,
    parse,
    pieces_in,
    render,
    seal,
)
from meshwright.run.checkpoint.meta import check_meta
from meshwright.run.checkpoint.region import Region

SUM = "0123456789abcdef" * 2
XXH3 = "xxh3-128"


def tree():
    """A manifest as JSON, without its digest: one matrix on two ranks, one scalar, one empty."""
    return {
        "version": 2,
        "step": 20,
        "meta": {"plan": "data=2", "seeds": [1, 2]},
        "entries": {
            "model/head": {
                "dtype": "float32",
                "shape": [4, 8],
                "pieces": [
                    {
                        "file": "rank0.safetensors",
                        "start": [0, 0],
                        "shape": [2, 8],
                        "digests": [SUM],
                    },
                    {
                        "file": "rank1.safetensors",
                        "start": [2, 0],
                        "shape": [2, 8],
                        "digests": [SUM],
                    },
                ],
            },
            "optimizer/step": {
                "dtype": "int64",
                "shape": [],
                "pieces": [
                    {"file": "rank0.safetensors", "start": [], "shape": [], "digests": [SUM]}
                ],
            },
            "buffer/none": {"dtype": "bool", "shape": [0, 3], "pieces": []},
        },
        "files": {
            "rank0.safetensors": {"bytes": 200, "header": SUM, "digest": XXH3},
            "rank1.safetensors": {"bytes": 120, "header": SUM, "digest": XXH3},
        },
    }


def refusal(change):
    """The message with which a sealed manifest is refused after `change(tree)`."""
    changed = tree()
    change(changed)
    with pytest.raises(StorageError) as caught:
        parse(seal(changed))
    return str(caught.value)


# ── round trip ───────────────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
names = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20
)


@st.composite
def manifests(draw):
    """Manifests whose entries are cut into grids, pieces strewn over files."""
    files = [f"rank{k}.safetensors" for k in range(draw(st.integers(1, 4)))]
    entries, used = {}, set()
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        parts = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=3))
        cuts = [[sum(sizes[:i]) for i in range(len(sizes))] for sizes in parts]
        pieces = tuple(
            Stored(draw(st.sampled_from(files)), Region(tuple(start), tuple(shape)), (SUM,))
            for start, shape in zip(product(*cuts), product(*parts), strict=True)
        )
        used.update(piece.file for piece in pieces)
        entries[name] = Entry(dtype, tuple(map(sum, parts)), pieces)
    listed = {name: File(draw(st.integers(10**6, 2**63 - 1)), SUM, XXH3) for name in sorted(used)}
    meta = draw(st.dictionaries(st.text(), json_values, max_size=3))
    return Manifest(draw(st.integers(0, 2**63 - 1)), meta, entries, listed)


@given(manifests())
def test_what_is_rendered_parses_to_the_same(manifest):
    assert parse(render(manifest)) == manifest


def test_infinities_in_meta_come_back():
    manifest = Manifest(1, {"best": float("inf")}, {}, {})
    assert parse(render(manifest)).meta == {"best": float("inf")}


@given(st.data())
def test_the_pieces_of_a_read_cover_it_exactly_once(data):
    parts = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), max_size=3))
    cuts = [[sum(sizes[:i]) for i in range(len(sizes))] for sizes in parts]
    entry = Entry(
        "uint8",
        tuple(map(sum, parts)),
        tuple(
            Stored("f", Region(tuple(a), tuple(n)), (SUM,))
            for a, n in zip(product(*cuts), product(*parts), strict=True)
        ),
    )
    start = tuple(data.draw(st.integers(0, size)) for size in entry.shape)
    shape = tuple(data.draw(st.integers(0, n - a)) for a, n in zip(start, entry.shape, strict=True))
    wanted = list(product(*(range(a, a + n) for a, n in zip(start, shape, strict=True))))
    got = []
    for piece, shared in pieces_in(entry, Region(start, shape)):
        assert all(a <= b for a, b in zip(piece.region.start, shared.start, strict=True))
        got += product(*(range(a, b) for a, b in zip(shared.start, shared.stop, strict=True)))
    assert sorted(got) == sorted(wanted)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


def head(t):
    return t["entries"]["model/head"]


HOSTILE_NAMES = [
    "../rank0.safetensors",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".hidden",
    "rank0.safetensors\x00",
    "rank0.safetensors\n",
    "rank０.safetensors",
    "C:x",
    "~root",
    "x" * 300,
    "a..b",
    7,
    None,
    ["rank0.safetensors"],
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_a_file_name_must_stay_in_the_folder(name):
    def change(t):
        head(t)["pieces"][0]["file"] = name

    assert "is no plain file name" in refusal(change)


@pytest.mark.parametrize("name", [n for n in HOSTILE_NAMES if isinstance(n, str)], ids=repr)
def test_a_listed_file_name_must_stay_in_the_folder(name):
    def change(t):
        t["files"][name] = t["files"].pop("rank0.safetensors")

    assert "is no plain file name" in refusal(change)


WRONG_COUNTS = [-1, 2**63, 10**40, True, 1.0, "4", None, [4], float("nan"), float("inf")]


@pytest.mark.parametrize("count", WRONG_COUNTS, ids=repr)
@pytest.mark.parametrize(
    "place",
    [
        lambda t, v: t.update(step=v),
        lambda t, v: t["files"]["rank0.safetensors"].update(bytes=v),
        lambda t, v: head(t)["shape"].__setitem__(0, v),
        lambda t, v: head(t)["pieces"][0]["start"].__setitem__(0, v),
        lambda t, v: head(t)["pieces"][0]["shape"].__setitem__(1, v),
    ],
    ids=["step", "bytes", "shape", "piece start", "piece shape"],
)
def test_counts_are_whole_numbers_in_range(place, count):
    assert "must be a whole number" in refusal(lambda t: place(t, count))


def test_a_product_that_overflows_is_refused():
    def change(t):
        head(t)["shape"] = [2**31, 2**31, 2**31]

    assert "larger than any file" in refusal(change)


IMPOSSIBLE = [
    (lambda t: head(t)["pieces"].pop(), "its pieces hold 16 of 32"),
    (lambda t: head(t)["pieces"].append(head(t)["pieces"][0]), "overlap"),
    (lambda t: head(t)["pieces"][1].update(start=[1, 0]), "overlap"),
    (lambda t: head(t)["pieces"][1].update(start=[3, 0]), "lies outside"),
    (lambda t: head(t)["pieces"][1].update(shape=[2, 7]), "its pieces hold 30 of 32"),
    (lambda t: head(t)["pieces"][1].update(shape=[2]), "lies outside"),
    (lambda t: head(t)["pieces"][1].update(shape=[0, 8]), "without elements"),
    (lambda t: head(t).update(shape=[1] * 17), "a list of 17 must be a list of at most 16"),
    (lambda t: head(t).update(shape="48"), "must be a list"),
    (lambda t: head(t).update(pieces={}), "pieces must be a list"),
    (lambda t: head(t).update(pieces=[3]), "must be a JSON object"),
    (lambda t: head(t).update(dtype="float31"), "known: bool"),
    (lambda t: head(t).update(dtype=["float32"]), "known: bool"),
    (lambda t: head(t)["pieces"][0].update(digests=["00"]), "32 hexadecimal digits"),
    (lambda t: head(t)["pieces"][0].update(digests=[SUM.upper()]), "32 hexadecimal digits"),
    (lambda t: head(t)["pieces"][0].update(digests=[7]), "32 hexadecimal digits"),
    (lambda t: head(t)["pieces"][0].update(digests=SUM), "digests must be a list"),
    (lambda t: head(t)["pieces"][0].update(digests=[]), "64 bytes has 0 digests, not 1"),
    (lambda t: head(t)["pieces"][0].update(digests=[SUM, SUM]), "64 bytes has 2 digests, not 1"),
    (lambda t: t["files"]["rank0.safetensors"].update(digest="md5"), "known: xxh3-128, crc32"),
    (lambda t: t["files"]["rank0.safetensors"].update(digest=3), "known: xxh3-128, crc32"),
    (lambda t: t["files"]["rank0.safetensors"].update(header=SUM[1:]), "32 hexadecimal digits"),
    (lambda t: head(t)["pieces"][0].update(offset=3), "unknown key 'offset'"),
    (lambda t: head(t)["pieces"][0].pop("start"), "has no 'start'"),
    (lambda t: head(t)["pieces"][0].update(file="rank9.safetensors"), "not among the files"),
    (lambda t: t["files"]["rank1.safetensors"].update(bytes=63), "its pieces need 64"),
    (lambda t: t["files"].update(x=None), "must be a JSON object"),
    (lambda t: t["entries"].update({"": head(t)}), "printable characters"),
    (lambda t: t["entries"].update({"a\x1b[2J": head(t)}), "printable characters"),
    (lambda t: t["entries"].update({"a" * 4097: head(t)}), "printable characters"),
    (lambda t: t.update(entries=[]), "entries must be a JSON object"),
    (lambda t: t.update(meta=[]), "meta must be a JSON object"),
    (lambda t: t.update(extra=1), "unknown key 'extra'"),
    (lambda t: t.pop("meta"), "has no 'meta'"),
    (lambda t: t.update(version=1), "format version 1, this Meshwright reads version 2"),
    (lambda t: t.update(version=True), "format version True"),
    (lambda t: t.pop("version"), "format version None"),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE, ids=range(len(IMPOSSIBLE)))
def test_impossible_claims_are_refused(change, message):
    assert message in refusal(change)


def test_meta_nested_past_the_limit_is_refused():
    value = {}
    for _ in range(40):
        value = {"a": value}
    assert "nested more than 32 deep" in refusal(lambda t: t.update(meta=value))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"\x80\x04\x95", "no JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 10_000, "no JSON"),
        (b'{"version": 2, "version": 2}', "'version' stands twice"),
        (b'{"version": 2}', "digest does not match"),
        (b'{"version": 2, "sha256": 5}', "digest does not match"),
        (b'{"version": 3, "new": "things"}', "load it with the release that wrote it"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(StorageError, match=message):
        parse(data)


def test_more_bytes_than_the_limit_are_not_even_parsed(monkeypatch):
    monkeypatch.setattr("meshwright.run.checkpoint.manifest.MANIFEST_BYTES", 100)
    with pytest.raises(StorageError, match="the limit is 100"):
        parse(seal(tree()))


def test_more_entries_than_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("meshwright.run.checkpoint.manifest._ENTRIES", 2)
    assert "it lists 3 entries; the limit is 2" in refusal(lambda t: None)


def test_a_changed_meta_is_noticed():
    data = seal(tree()).replace(b"data=2", b"data=4")
    with pytest.raises(StorageError, match="digest does not match"):
        parse(data)


@given(st.data())
@settings(max_examples=300)
def test_no_flipped_bit_goes_unnoticed(data):
    whole = bytearray(seal(tree()))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        got = parse(bytes(whole))
    except StorageError:
        return
    assert got == parse(seal(tree()))  # white space may differ, or the digits of an escape


# ── fuzzing ──────────────────────────────────────────────────────────────────────────────────────


def places(value, path=()):
    """Every place in a JSON value that can be changed."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


hostile = st.one_of(
    json_values,
    st.sampled_from([*HOSTILE_NAMES, *WRONG_COUNTS, "rank1.safetensors", SUM, 0, 1, [], {}, [0]]),
    st.floats(),
    st.integers(),
)


@st.composite
def mutations(draw):
    """The valid tree after a few changes anywhere: replaced, removed, doubled or moved values."""
    root = {"": tree()}
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from([p for p in places(root) if p]))
        parent = root
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "double", "swap"]))
        if kind == "replace":
            parent[path[-1]] = copy.deepcopy(draw(hostile))
        elif kind == "remove" and len(path) > 1:
            del parent[path[-1]]
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif kind == "double":
            parent[draw(st.text(max_size=3))] = copy.deepcopy(parent[path[-1]])
        else:
            other = draw(st.sampled_from(list(places(root))))
            value = root
            for key in other:
                value = value[key]
            parent[path[-1]] = copy.deepcopy(value)
    return root.get("", {})


def box(region):
    return set(product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True))))


def believed(manifest):
    """Everything that reading relies on, checked by brute force where that can be."""
    assert all("/" not in name and ".." not in name for name in manifest.files)
    for entry in manifest.entries.values():
        assert all(piece.file in manifest.files for piece in entry.pieces)
        if max(entry.shape, default=0) > 100:
            continue
        boxes = [box(piece.region) for piece in entry.pieces]
        assert all(boxes)
        assert sum(map(len, boxes)) == len(set().union(*boxes))
        assert set().union(*boxes) == set(product(*map(range, entry.shape)))


@given(mutations())
@settings(max_examples=600)
def test_a_mutated_manifest_is_refused_or_possible(mutated):
    data = seal(mutated) if isinstance(mutated, dict) else json.dumps(mutated).encode()
    manifest, message = None, ""
    try:
        manifest = parse(data)
    except StorageError as error:
        message = str(error)
    if manifest is None:
        assert 0 < len(message) < 2000
        assert message.isprintable()
    else:
        believed(manifest)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(StorageError):
        parse(data)


@given(st.data())
@settings(max_examples=200)
def test_mutated_bytes_are_refused_or_the_same(data):
    whole = bytearray(seal(tree()))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole)))
        cut = data.draw(st.integers(0, 8))
        whole[at : at + cut] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(StorageError):
        assert parse(bytes(whole)) == parse(seal(tree()))


# ── meta ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"extra": {"seen": {1, 2}}}, r"meta.extra.seen is a set"),
        ({"extra": [1, b"x"]}, r"meta.extra\[1\] is a bytes"),
        ({"extra": {3: "x"}}, r"meta.extra has the key 3, a int; keys must be strings"),
        ([], "meta must be a JSON object"),
    ],
)
def test_meta_that_json_would_change_is_refused(meta, message):
    with pytest.raises(StorageError, match=message):
        check_meta(meta)


def test_meta_of_json_is_kept():
    check_meta({"a": [1, 2.5, None, True, "x", {"b": (1, 2)}]})
