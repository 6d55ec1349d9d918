"""Reading toc.dat: every version's layout, every kind of damage, hostile headers, and time that stays linear."""

from __future__ import annotations

import base64
import struct
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgkeep.domain import toc
from pgkeep.domain.toc import Entry, Section, TableName, Toc
from pgkeep.errors import FormatError

# toc.dat as pg_dump 15, 16 and 18 wrote it for one small database (zlib, base85): a table with a foreign key to
# itself in the schema "Ünï", a partitioned table with one partition and a comment, one large object.
_PACKED = {
    15: (
        "c-o~_+m4$?7-pNaO|0Fh7j4rfQu5aq#cnsQ!SW%ARuv0)je@~~*;Kwl7_(j!f|1Qi$xZGeweQe(=tJZo+P+O^1~3QX#Bz~l%*_1EeBbvUJd+"
        "D)JUP0@+`e;*p--Q5zmV>0(%mOrjdbsr^tp{&<OOe;NBD*7w)i$QBzNZ70npKt_Rn*7#_=~?b03qh$exc*(%p}6YbX63+{>D%ONw?;9DGJU!"
        "p)QsIKJlwk>v)?a_$8SI0N<)4F~M=+7a1jXUBYw+m-FF-FQf!$CXHk1SXP9WZ=`y@{powBxu%=9n9_3+;Wz|)pGS3BeK@f3jeGLvSn}>F4&D"
        "r77TGT5zweSq__rjPL)Lj;lgt4$o7|u*4m9IKyT4t*RH*CuC36HuGv#yaifPf55oDwNj^?EzQ<EDuGi=KS?CaFN&*tj1yhb;`nZXPEFc-u1t"
        "6yIn}SAw<ncr$YiAI-uS4IC+%}}quyHu3x+ti!H8J#;iX<C&!S`lPGEL0H7B+lBLW9P)WayLPan+nD-f+2&7AtpMN&AaJdhk82yP-XxZy){)"
        "KKw<^OmQTSg_!mIjCDK>b!u400KZ8AmRAl#_zzQbO!sMuu*1`63h5YYp(ZZ*H3LUyA-tLSp3@4UQ3L$g;02Mpa96cvZ6X**L5i-y`4m*eM9{"
        "FCc@o7P5)xF8crFg@{ixI{bK%PrJ%sdK)W>64Lv)p?XA^)ymiQ<puudT_bI3j^GDB)7&-HQ$|J^Nimx>#5Wwn3Wr8c)MHx~BWYGJt@%2FKHt"
        "{v{r;qRRsxTn-Sf-MsBGKnN;TXk$)FB1VxN1$D*>M5O{;oN=`fg}%wOBDh8hJE&o%*3lsf&POc{lYP+1X<ecr2zRR&;R{#Rg@*pJKhAFfRG?"
        "2wRVJ?pdws(;x%1Ur&*N6mXM`N=Ha1kz)L~Blub}HXmHK{8H@c2e?B-Vm8i}pCI`7UvUslQ=P{!nEB`(GrRA(#T!b4e{fH$l*=c$c_+IcTXL"
        "?ux`~D<xMdFFAgsN?PLP|PSAh-WxS^*~0d|ug27#jK*|7YWi1Ez3*(3wrA)9tk8cEo&F4K$ZEA4l3uk(QFjK84vSI3>)RDBl-yw*Z-^kRO&H"
        "XTV7)n7OxGAG;Ckz8l=dZRRg$>sGXMnBR|!q1f)FBJn+%T9`24W`(cZw^S`r*YIsiP;fmbpD<cgrWN#}MMIDz$UcR7x@R3GhB6k6DZG%U$zR"
        "p;Pi_gc;#BTeU32#L27Uh6ElZ!dmy^Y@u81(iX~P##*2X_vn|R|osYkMMp~dRph%@A&Y~cGAu1|%HV&%>bR4zGfOS`=zney%M?ZLK~{{cGvH"
        "RA"
    ),
    16: (
        "c-o~_+m4$?7-qX^o3(nnXd9^)%`aaRyV|<Ou^n%sRmB2cqhPRLHkGds#;n&00c41j+~i5}4ta>YMB5kXLF!><0CO;8EqA0D4>Lc*_kI7tGrJ"
        "V0v!l<MJ9m#6X2jt3BN@IV!#y%I$ncs;+a27awfBno5Kp*ahwJBNUl5DGPg2_>+`Gwm7mt!EXrioM79Tz!rr+XjNC<3q?Rb&tc(%V>dn-5x_"
        "6m(h?Bm7}Ij44@Ag(PpbmB+a{;5Pl2pLE;kdD7@lpiUYR)QvsEN^LTmZt4{*Z$@?Mr4N32LFTvneQEj>)(1@60ZxB8ILCAM~Z7i*Az)W5Ufn"
        "wiY(V(bwVei0N1M)8#>m;zA*zUx?xX&#hre<eGtyr_o>&p-msVW`s~4376`<dB9HhB-jHILF7ARZ@koMn1Bfa7ETah^X*yHL-Z@0h^T4$trw"
        "eH`Y#k1YCh&@6&UEdmEJ`}waMuevSte#e2OIuCLW4%DsB5$0=c+kVyn!D^tBn&@(*CFr?7bm3NNM-GboTCz_wFq<GlYpW<zv?OGS=}jG^t?|"
        "1N<rlSl&4d;jc{5F@v)d;h;~WDWK0-3ng*MPZ>D63c-toyS6(4v>Je$1#2&IR?eo;Zp?Tc$w<~zxR`??8wgrfJ5Qo`LPCP-5wFFey&sjMMpZ"
        "6+oT7(-&IN5cl~hD`nP#>C7-Wf$YyfK)@-m0)R*{)w;&Sd`4&iV0Vn3wf23%R~@9Wg&cIC#xeqAjrSEDS&apPFQ{v3X(<<RG-c?3HomSqx2&"
        "~}>GxLGCws)j(lQj}A=zQDQtG6GQ=^H&N2_9gr15m||M?E?L8iu4PgNhQeAZZ8GMJHs4*yRzaY&iiB=Y&=4|kkr}<?!1C<<%#z+Rhef|7F$A"
        "=Dw&7JnhsBS<w`O@R-whU|7R?YD*XB9NvT9VNc}nN=4NE`LeVZ_M&DKbd$_)7Zya2NTP%HvB`&Eoec`!l?^(|DumbkSN#csc6FUjj*!qN&bg"
        "Dq^{QI;5%;x#Lvf41#wJHA3#uo=n;Q*mCo8Dm1>nyE^`MnxwE^FS8w4EX?C69Fqi&L;mn72{BFXUkXGDji*Rf3!WC!t{EX2<Wl5!Bxe$oUJ`"
        "Uxb~=x0&lwD0YWikw!GNFk!&m44yf!s9J)i;@cK4<9beBVbrQjE9gaw1}}<`y$a3r%qGlqdCKc^cp}Y{zpBT#9tpJKRGwE|bN2TJZL4}&&X~"
        "_~ve@P|5$038G=2hQZQR4Pi4Sg)dL+r0YOD^9I9(b`I=*k=`cyb5R_^>j<&v-MXm@)gQ+@hapG3r6G5-T_E-nu"
    ),
    18: (
        "c-pO2?QY{l6m{7Jb}c{)yRfiGaFstvP#fa3P1CL_G<7D8wT^As(_Q74<v4B{ktSB+m9`S_B)kI;v9AF<3p3+y$APBB(oDv8u4m3Y_uQEn=iP"
        "y^^F(;~=z$=d2=w`pb<bG$oOL4WeiP#7A#K5Qe!~Y+r*V)Dp73wP*mH-rX4F5TJ=SEst7zx>mk*fhceGiUfIFLd^T77z?qWQhPv8`)7o^vzz"
        "7%)ZI%QqB6(4;_+odyGdFh1kbtxQXv`E(?CWT-XUpb^&1ZfpG^RcrW+wNk1xmaFPSoSJd(w`NBx0v4p+&7!SVPwjE1Cf65m4oYWn~G%u{={~"
        "jz?m&3jg=R0l+#JAy7HW*du97ha8=!fDs6o8`rX045VI1HTJ08hliJ60l&FH`wu=ZlLlzFP&S;ZOj0lE!0+=hjQAi&M9vCW{JB7fz_GeDuH6"
        "a#9l7CQj8L8MdO#QXe#U`DYO-F8IW^QtWI_@#0aOrkU-N<iO9(edL(Eef-OqSlNH1>~j@^7`J!zA{7K6?NA{QV!?&64|gfWpw9r=f>tsBp&$"
        "MfqinvN&@On12cR6dfMNFpoN1Tt0uNtf*0Peo7H?EBJ3mv#Hzgp(X--9GK1nZ{jV*x@aJiC`8dUI2(ehSOjWLJsU}Wg(wnEN@&Xn%)eDU-<H"
        "<L$8iYY^RcWC23R9}R;Z)~phycrDHc@ST)}4G-HvYI0aHLr$~gYLk@k+nY4)We?>}tfU0NreQv6jp#nJ|jIgTsO@rC79f&95KkoEz04`3~la"
        "WRre$c+kht`wsIO(&pTsOm1ak7&`q3!sa8=t3n>eOEm>VU}>#&2jJ|&p~dRn1{3!Z%+gJu$>{{=5d+mqBMSzXb%yB<mfo=(}q++&!uoq*VJJ"
        "uy3iBS@=0^u(@l7d)C+8ZqCrin{~yw9m1On{F^VS&XHB1C5*Rx*`3jj$zvoqD46`zI>d-Uw0lgsURZa7ASG1uc^JyI(bsA$Q5I!$Qn-Sr^!>"
        "z|~3tDt`VYCZw0eB*st#CJUxQ{sQr()rn*iVQ)$c#Rvqcc@Mg8?Qe!Oscg4kBN5Zx6<Audi?JaUVP@@R-ki2#Eo)3IuMuWf<<^(Q!2BMAG|="
        "w$W@cTG`arYy=Be_~mh)qGmg}qFTJVXr_QR+yB|S;c1q2js7u13O(W3CxTX1Y`H}9!vl4@kbVl4c+CnJrZPb05MJS7bc4P8&n1DMJf-WEpFL"
        "a3h(Et>=4PLB8FS;>my8{zquwhh5;VIzLE*v`b}nJ%Tnj0p^<v^4HtD}IdQRmQ3h6t&BYn|sYXojrhap)9t<E~5{{Tt(9h3"
    ),
}
_REAL = {major: zlib.decompress(base64.b85decode(packed)) for major, packed in _PACKED.items()}


def _integer(value: int) -> bytes:
    return struct.pack("<BI", value < 0, abs(value))


def _text(value: str | bytes | None) -> bytes:
    if value is None:
        return _integer(-1)
    raw = value.encode() if isinstance(value, str) else value
    return _integer(len(raw)) + raw


def _header(version: tuple[int, int], count: int, **other: int) -> bytes:
    """``other`` replaces single bytes of the preamble, or the compression."""
    given = {"revision": 0, "integer": 4, "offset": 8, "format": 3, "compression": 0, **other}
    start = bytes([*version, given["revision"], given["integer"], given["offset"], given["format"]])
    packed = bytes([given["compression"]]) if version >= (1, 15) else _integer(given["compression"])
    texts = _text("db") + _text("9.6.24") + _text("9.6.24")
    return b"PGDMP" + start + packed + _integer(0) * 7 + texts + _integer(count)


def _entry(version: tuple[int, int], **other: Any) -> bytes:
    """One TABLE DATA entry; ``other`` replaces its fields."""
    fields: dict[str, Any] = {
        "dump_id": 7,
        "had_dumper": 1,
        "table_oid": "0",
        "oid": "16385",
        "name": "t",
        "description": "TABLE DATA",
        "section": 3,
        "dependencies": ("5",),
        "filename": "7.dat",
        "schema": "public",
        "relkind": 0,
        **other,
    }
    parts = [_integer(fields["dump_id"]), _integer(fields["had_dumper"]), _text(fields["table_oid"])]
    parts += [_text(fields["oid"]), _text(fields["name"]), _text(fields["description"]), _integer(fields["section"])]
    parts += [_text(""), _text(""), _text("COPY public.t FROM stdin;\n"), _text(fields["schema"]), _text(None)]
    parts += [_text("heap")] if version >= (1, 14) else []
    parts += [_integer(fields["relkind"])] if version >= (1, 16) else []
    parts += [_text("owner"), _text("false"), *(_text(each) for each in fields["dependencies"]), _text(None)]
    return b"".join([*parts, _text(fields["filename"])])


def _archive(version: tuple[int, int] = (1, 16), **other: Any) -> bytes:
    return _header(version, 1) + _entry(version, **other)


def _one(toc_read: Toc, description: str, name: str) -> Entry:
    (found,) = [each for each in toc_read.entries if (each.description, each.name) == (description, name)]
    return found


@pytest.mark.parametrize(("major", "version"), [(15, (1, 14)), (16, (1, 15)), (18, (1, 16))])
def test_a_real_archive(major: int, version: tuple[int, int]) -> None:
    found = toc.read(_REAL[major], "utf-8")
    assert (found.archive_version, found.database, found.encoding) == (version, "tiny", "UTF8")
    assert found.dump_version == found.server_version
    assert found.dump_version.startswith(f"{major}.")
    table = _one(found, "TABLE", "t 1")
    assert (table.schema, table.owner, table.section) == ("Ünï", "postgres", Section.PRE_DATA)
    assert table.table_name == TableName("Ünï", "t 1")
    assert str(table.table_name) == '"Ünï"."t 1"'
    assert 'CREATE TABLE "Ünï"."t 1" (' in table.definition
    assert table.relkind == ("r" if major == 18 else "")
    assert table.catalog[0] == 1259
    assert not table.had_dumper


@pytest.mark.parametrize("major", _REAL)
def test_data_entries_of_a_real_archive(major: int) -> None:
    found = toc.read(_REAL[major], "utf-8")
    names = [(each.description, each.schema, each.is_table_data, each.is_large_objects) for each in found.data_entries]
    assert names == [
        ("TABLE DATA", "public", True, False),
        ("TABLE DATA", "Ünï", True, False),
        ("BLOBS", None, False, True),
    ]
    first, second, blobs = found.data_entries
    assert first.copy_statement == "COPY public.p1 (a) FROM stdin;\n"
    assert first.filename == f"{first.dump_id}.dat"
    assert blobs.filename == (f"blobs_{blobs.dump_id}.toc" if major == 18 else "blobs.toc")
    assert found.table_of(first) == _one(found, "TABLE", "p1")
    assert found.table_of(second) == _one(found, "TABLE", "t 1")
    assert found.table_of(blobs) is None


def test_partitions_and_dependents_of_a_real_archive() -> None:
    found = toc.read(_REAL[15], "utf-8")
    parent, child = _one(found, "TABLE", "p"), _one(found, "TABLE", "p1")
    assert found.partitions == {parent.dump_id: [(_one(found, "TABLE ATTACH", "p1"), child)]}
    assert [each.description for each in found.dependents[parent.dump_id]] == ["COMMENT", "TABLE", "TABLE ATTACH"]


@pytest.mark.parametrize("version", [(1, minor) for minor in range(12, 17)])
def test_every_version_s_layout(version: tuple[int, int]) -> None:
    (entry,) = toc.read(_archive(version), "utf-8").entries
    assert entry == Entry(
        dump_id=7,
        catalog=(0, 16385),
        description="TABLE DATA",
        schema="public",
        name="t",
        owner="owner",
        section=Section.DATA,
        definition="",
        copy_statement="COPY public.t FROM stdin;\n",
        dependencies=(5,),
        filename="7.dat",
        had_dumper=True,
    )


def test_an_extension_s_configuration_table_has_no_table() -> None:
    found = toc.read(_archive(dependencies=()), "utf-8")
    assert found.table_of(found.entries[0]) is None


def test_bytes_that_the_codec_refuses_stay_visible() -> None:
    assert toc.read(_archive(name=b"caf\xe9"), "utf-8").entries[0].name == "caf\\xe9"
    assert toc.read(_archive(name=b"caf\xe9"), "latin-1").entries[0].name == "café"


@pytest.mark.parametrize("version", [(1, 11), (1, 17), (2, 0), (0, 14)])
def test_an_unknown_version_asks_for_an_update(version: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="is not known here") as caught:
        toc.read(_header(version, 0), "utf-8")
    assert "update pgkeep" in caught.value.hint


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"revision": 1}, r"1\.16-1 is not known"),
        ({"integer": 8}, "unusual integer sizes"),
        ({"offset": 3}, "unusual integer sizes"),
        ({"format": 1}, "not of the directory format"),
        ({"compression": 4}, "unknown compression"),
    ],
)
def test_a_preamble_of_another_kind(other: dict[str, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        toc.read(_header((1, 16), 0, **other), "utf-8")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dump_id": 0}, "not positive"),
        ({"dump_id": -7}, "not positive"),
        ({"dump_id": 2**31}, "impossible number"),
        ({"oid": "-1"}, "malformed number"),
        ({"oid": " 1"}, "malformed number"),
        ({"oid": "1_0"}, "malformed number"),
        ({"oid": ""}, "malformed number"),
        ({"oid": None}, "malformed number"),
        ({"oid": str(2**32)}, "malformed number"),
        ({"oid": "٣"}, "malformed number"),
        ({"oid": "9" * 5000}, "malformed number"),
        ({"dependencies": ("x",)}, "malformed number"),
        ({"dependencies": (str(2**31),)}, "malformed number"),
        ({"section": 0}, "unknown section"),
        ({"section": 5}, "unknown section"),
        ({"relkind": 200}, "kind of relation"),
        ({"relkind": -1}, "kind of relation"),
        ({"name": "a\0b"}, "zero byte"),
        ({"filename": ""}, "data without a file"),
        ({"had_dumper": 0}, "data file without data"),
        ({"filename": "../7.dat"}, "file name"),
        ({"filename": "/etc/passwd"}, "file name"),
        ({"filename": "7.dat\n"}, "file name"),
        ({"filename": "toc.dat"}, "file name"),
        ({"filename": b"\xff.dat"}, "file name"),
    ],
)
def test_a_damaged_entry(other: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        toc.read(_archive(**other), "utf-8")


def test_nothing_comes_twice() -> None:
    version = (1, 16)
    with pytest.raises(FormatError, match="dump id 7"):
        toc.read(_header(version, 2) + _entry(version) + _entry(version, filename="8.dat"), "utf-8")
    with pytest.raises(FormatError, match=r"'7\.dat'"):
        toc.read(_header(version, 2) + _entry(version) + _entry(version, dump_id=8), "utf-8")


@pytest.mark.parametrize("major", _REAL)
def test_every_truncation_is_an_error(major: int) -> None:
    data = _REAL[major]
    for size_bytes in range(len(data)):
        with pytest.raises(FormatError):
            toc.read(data[:size_bytes], "utf-8")


@pytest.mark.parametrize("tail", [b"\0", b"x", _REAL[15]])
def test_anything_after_the_last_entry_is_an_error(tail: bytes) -> None:
    with pytest.raises(FormatError, match="after its last entry"):
        toc.read(_REAL[16] + tail, "utf-8")


@pytest.mark.parametrize("sign", [0, 1, 2, 255])
@pytest.mark.parametrize("size", [2, 2**31 - 1, 2**31, 2**32 - 1])
def test_an_absurd_length_or_count_takes_no_memory(sign: int, size: int) -> None:
    number = struct.pack("<BI", sign, size)
    start = _header((1, 16), 0)[:-_INTEGER_BYTES]
    one = _archive()
    name_at = one.index(_text("TABLE DATA"))
    tracemalloc.start()
    try:
        for data in (start + number, start + number + b"\0" * 60, one[:name_at] + number + one[name_at + 5 :]):
            with pytest.raises(FormatError):
                toc.read(data, "utf-8")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


_INTEGER_BYTES = len(_integer(0))


@pytest.mark.parametrize("codec", ["no such codec", "zlib_codec", "rot13", "a\0b", ""])
def test_an_unknown_codec(codec: str) -> None:
    with pytest.raises(FormatError, match="encoding"):
        toc.read(_REAL[15], codec)


@pytest.mark.parametrize("codec", ["utf-8", "latin-1", "euc_jp", "cp1252", "koi8_r", "gb18030", "shift_jis", "ascii"])
def test_any_codec_that_keeps_ascii_reads_the_structure(codec: str) -> None:
    found = toc.read(_REAL[15], codec)
    assert [each.dump_id for each in found.entries] == [each.dump_id for each in toc.read(_REAL[15], "utf-8").entries]


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(_REAL)),
    st.lists(st.tuples(st.integers(0, 3500), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=4),
)
@example(15, [(5, b"\x01\x10", 2)])
def test_a_mutated_archive_is_read_or_refused(major: int, edits: Sequence[tuple[int, bytes, int]]) -> None:
    data = _REAL[major]
    for place, replacement, removed_bytes in edits:
        data = data[:place] + replacement + data[place + removed_bytes :]
    try:
        found = toc.read(data, "utf-8")
    except FormatError as error:
        assert error.message  # noqa: PT017
        return
    # What was read leaves nothing dangling for those who use it.
    for entry in found.data_entries:
        found.table_of(entry)
    assert found.dependents is not None
    assert found.partitions is not None


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_noise_after_a_good_header_is_refused(noise: bytes) -> None:
    with pytest.raises(FormatError):
        toc.read(_header((1, 14), 1) + noise, "utf-8")


def _many(count: int) -> bytes:
    entries = (
        _entry((1, 16), dump_id=number, name=f"t{number}", dependencies=("1", "2"), filename=f"{number}.dat")
        for number in range(1, count + 1)
    )
    return _header((1, 16), count) + b"".join(entries)


def _seconds(data: bytes) -> float:
    def once() -> float:
        started = time.process_time()
        found = toc.read(data, "utf-8")
        assert found.dependents[1]
        return time.process_time() - started

    return min(once() for _ in range(3))


def test_time_grows_with_the_number_of_entries_and_not_with_its_square() -> None:
    # Ten times the entries: about 10 where linear, about 100 where quadratic.
    assert _seconds(_many(10_000)) < 40 * max(_seconds(_many(1_000)), 0.001)


def test_memory_stays_a_small_multiple_of_the_archive() -> None:
    data = _many(5_000)
    tracemalloc.start()
    try:
        found = toc.read(data, "utf-8")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.entries) == 5_000
    assert peak_bytes < 10 * len(data)


@pytest.mark.parametrize(
    ("name", "quoted"),
    [("plain_1", "plain_1"), ("Mixed", '"Mixed"'), ("select", '"select"'), ('a"b', '"a""b"'), ("ö", '"ö"'), ("", '""')],
)
def test_quoting(name: str, quoted: str) -> None:
    assert toc.quote_identifier(name) == quoted
