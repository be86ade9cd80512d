import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slm_fast import plan

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def audit(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import audit

    return audit


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline

    return roofline


def run_audit(tmp_path, *arguments):
    """(exit status, what `--json` wrote). The interpreter that other tests use compiles nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = tmp_path / "audit.json"
    command = [sys.executable, str(BENCHMARKS / "audit.py"), "--quick", "--json", str(result), *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    return run.returncode, json.loads(result.read_text())


# One architecture: each takes minutes, and `make audit` compiles for all.
@pytest.mark.slow
def test_every_kernel_of_a_table_passes(audit, tmp_path):
    status, result = run_audit(tmp_path, "--arch", "90")
    assert result["failures"] == []
    assert set(result["kernels"]) == audit.kernels_of_package()
    assert {m["arch"] for m in result["measured"]} == {90}
    assert status == 0


def row_of(op, phase, **changes):
    """A row of sm_90's table with some tiles changed."""
    rows = plan.load("sm_90")["rows"]
    row = copy.deepcopy(next(row for row in rows if row["op"] == op and row["phase"] == phase))
    for key, tiles in changes.items():
        row["plan"][key] |= tiles
    return row


def test_refuses_oversized_tiles(audit, tmp_path):
    deep = {"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_K": 256, "num_stages": 6}
    broad = {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 1}
    rows = [
        row_of("mixture", "forward", shrink=deep),
        row_of("mixture", "backward", coefficients=broad),
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"architecture": "sm_90", "rows": rows}))
    status, result = run_audit(tmp_path, "--plans", str(tmp_path), "--arch", "90", "--op", "mixture")
    assert status == 1
    assert any("_mixture_shrink_kernel" in f and "shared memory" in f for f in result["failures"])
    assert any("_mixture_coefficients_bwd_kernel" in f and "spills" in f for f in result["failures"])


def good(**changes):
    """A measurement without faults."""
    half = {"precision": "tf32", "shape": (64, 64, 64), "dtypes": ("bf16", "bf16")}
    return {
        "arch": 90,
        "constants": {"PDL": True},
        "launch_pdl": True,
        "pdl": True,
        "aligned": True,
        "walks_features": True,
        "registers": 128,
        "threads": 256,
        "shared": 227 * 1024,
        "stack": 0,
        "local": 0,
        "local_accesses": 0,
        "atomics": 0,
        "tensor_memory": 512,
        "wide_loads": 4,
        "narrow": [],
        "dots": [half],
        "tensor": {"HGMMA": 4},
    } | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "spills"),
        ({"local_accesses": 1}, "spills"),
        ({"registers": 168, "threads": 512}, "registers"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"arch": 86, "shared": 99 * 1024 + 1, "tensor": {"HMMA": 4}}, "shared memory"),
        ({"tensor": {}}, "without tensor-core instructions"),
        ({"tensor": {"HMMA": 4}}, "without HGMMA"),
        ({"arch": 100, "tensor": {"HMMA": 4}}, "without UTC"),
        ({"wide_loads": 0}, "no 128-bit"),
        ({"narrow": ["x.py:1 reads 2 bytes at a time, 16 wanted"]}, "reads 2 bytes"),
        ({"pdl": False}, "PDL"),
        ({"launch_pdl": False}, "PDL"),
        ({"constants": {}}, "PDL"),
        ({"atomics": 1}, "atomic"),
        ({"error": "PTXASError"}, "does not compile"),
    ],
)
def test_each_fault_has_a_line(audit, changes, words):
    assert audit.faults(good()) == []
    assert any(words in fault for fault in audit.faults(good(**changes)))


def test_odd_sizes_may_spill(audit):
    assert audit.faults(good(aligned=False, stack=8, local_accesses=2)) == []


def test_exact_products_need_no_tensor_cores(audit):
    exact = {"precision": "ieee", "shape": (64, 64, 64), "dtypes": ("f32", "f32")}
    assert audit.faults(good(dots=[exact], tensor={})) == []


def test_reads_what_the_tools_print(audit):
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/              @UP0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR9] ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/                   REDUX.MAX.S32 UR4, R5 ;
        /*0080*/                   RED.E.ADD.F32 desc[UR4][R2.64], R5 ;
    """
    counted = audit.instructions(sass)
    assert counted["tensor"] == {"HGMMA": 1, "UTCHMMA": 1}
    assert (counted["wide_loads"], counted["loads"]) == (2, 3)
    assert (counted["local_accesses"], counted["atomics"]) == (1, 1)

    ttir = "%y = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x256xbf16> * tensor<256x32xbf16> -> t"
    assert audit.dots(ttir) == [{"precision": "tf32", "shape": (16, 32, 256), "dtypes": ("bf16", "bf16")}]


def test_linear_of_llama_2_7b(roofline):
    weight = 4096 * 4096 * 2
    linear = roofline.count_linear(1, 4096, 4096)
    assert linear.hbm == weight + 2 * 4096 * 2
    h100 = roofline.DEVICES["H100"]
    assert weight / h100.hbm == pytest.approx(10.0e-6, rel=0.01)
    assert h100.floor(linear) == pytest.approx(10.0e-6, rel=0.01)


def test_factors_of_twelve_entries_are_1_57_mb(roofline):
    tiles = roofline.LinearTiles(16, 32, splits=1)
    fused = roofline.count_fused_linear(1, 4096, 4096, tiles)
    shrink = roofline.count_shrink(1, 4096, 96, 96)
    added = fused.hbm + shrink.hbm - roofline.count_linear(1, 4096, 4096).hbm
    # A and B, u out and 2 blocks of 16 columns in, x once more.
    assert added == 96 * (4096 + 4096) * 2 + 4 * (96 + 32) + 4096 * 2
    assert 96 * (4096 + 4096) * 2 / 1e6 == pytest.approx(1.57, abs=0.01)


def test_two_passes_cost_17_percent_of_a_prefill(roofline):
    tokens = 16384
    shrink, expand = roofline.count_gather(tokens, 4096, 4096)
    factors, u = 96 * 8192 * 2, 2 * 4 * 16 * tokens
    assert shrink.hbm + expand.hbm == tokens * (4096 + 2 * 4096) * 2 + factors + u
    assert (4096 + 2 * 4096) * 2 == 24_576  # bytes a token against
    assert roofline.count_linear(1, 4096, 4096).operations == 33_554_432
    lines = roofline.paths(roofline.DEVICES["H100"], tokens, 4096, 4096)
    gather = next(line for line in lines if line.path == "gather")
    assert gather.percent == pytest.approx(17.5, abs=0.5)
    assert gather.verdict == "the floor itself exceeds it"


def test_one_pass_reads_the_factors_again_from_l2(roofline):
    cost = roofline.count_one_pass(1, 4096, 4096)
    assert cost.hbm == 16 * 8192 * 2 + 3 * 4096 * 2  # 2 entries, x, y twice
    assert cost.l2 == 16 * (16 * 4096 * 2 + 4096 * 2)  # 16 blocks of 256 outputs: 16 rows of A, and x


def test_inline_reads_a_again_in_every_block(roofline):
    tiles = roofline.LinearTiles(64, 64, splits=8)
    inline = roofline.count_fused_linear(64, 4096, 4096, tiles, inline=True)
    assert inline.l2 == 64 * 96 * 4096 * 2 + 96 * 4096 * 2  # A 64 times, B once


def test_prefill_and_backward_meet_their_targets_where_passes_overlap(roofline):
    h100 = roofline.DEVICES["H100"]
    lines = {line.path: line for line in roofline.paths(h100, 16384, 4096, 4096)}
    # A tile of one row expands 2 blocks of 16 columns, in tf32 at half the rate; the shrink makes all 96.
    assert lines["fused, u given"].percent == pytest.approx(100 * 2 * 32 / 4096, abs=0.01)
    assert lines["fused, overlapped"].percent == pytest.approx(100 * (2 * 32 + 96) / 4096, abs=0.01)
    # Gathered: the row's 16 columns in both.
    assert lines["segments, overlapped"].percent == pytest.approx(100 * 3 * 16 / 4096, abs=0.01)
    assert lines["segments, overlapped"].verdict.startswith("within")
    assert lines["segments backward, overlapped"].verdict.startswith("within")
    for path in ("segments, shrink first", "segments backward, serial"):
        assert lines[path].verdict == "the floor itself exceeds it"


def test_a_decoding_tile_expands_every_entry_that_a_row_picks(roofline):
    tiles = roofline.LinearTiles(64, 64, splits=1)
    assert tiles.expanded(64, 96) == 96 and tiles.expanded(1, 96) == 32 and tiles.expanded(4096, 96) == 32


def test_overlap_needs_dependent_launch(roofline):
    memory, compute = roofline.Cost(hbm=3.35e6), roofline.Cost(operations=8e8)
    h100, a100 = roofline.DEVICES["H100"], roofline.DEVICES["A100"]
    assert h100.overlapped(memory, compute) == pytest.approx(1e-6, rel=0.01)
    assert h100.serial(memory, compute) == pytest.approx(2e-6, rel=0.01)
    assert a100.overlapped(memory, compute) == a100.serial(memory, compute)


def test_search_of_a_million_keys(roofline):
    h200 = roofline.DEVICES["H200"]
    assert roofline.count_key_search(1, 1_000_000, 768).hbm == pytest.approx(1.54e9, rel=0.01)
    assert roofline.search_floor(h200, 1, 1_000_000, 768) == pytest.approx(0.32e-3, rel=0.02)


def test_report_prints_every_shape(roofline, capsys):
    roofline.report()
    text = capsys.readouterr().out
    assert "not measurements" in text
    for model in roofline.MODELS:
        assert text.count(f"{model.name}, o_proj") == len(roofline.TOKENS)
