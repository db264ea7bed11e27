"""What the kernels' machine code for an H200 costs, and that it is read right."""

import pytest

from benchmarks.gpu_static.__main__ import measure
from benchmarks.gpu_static.compile import Case, disassembler
from benchmarks.gpu_static.sass import find_loop, scheduler_cycles

# A loop of 9 instructions, of which a whole tile skips three; the wait for counter 2 lies outside it.
LOOP = """
   -:-:-:Y:04        /*0000*/                   MOV R1, RZ
.L_x_1:
   -:-:2:Y:02        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
   2:-:-:Y:05        /*0020*/              @!P0 BRA `(.L_x_9)
.L_x_2:
   -:-:-:Y:03        /*0030*/                   HGMMA.64x128x16.F32.BF16 R8, gdesc[UR8], R8, gsb0
   -:-:-:Y:02        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:-:Y:05        /*0050*/               @P1 BRA `(.L_x_3)
   -:-:1:Y:04        /*0060*/                   LDSM.16.M88.4 R20, [R29]
   1:-:-:Y:02        /*0070*/                   SEL R20, R20, RZ, P2
   -:-:-:Y:01        /*0080*/                   STSM.16.M88.4 [R29], R20
.L_x_3:
0x02:-:-:Y:04        /*0090*/                   FADD R8, R8, R9
   -:-:-:Y:05        /*00a0*/               @P3 BRA `(.L_x_1)
   -:-:-:Y:05        /*00b0*/                   EXIT
.L_x_9:
   -:-:2:Y:02        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
   2:-:-:Y:05        /*00d0*/              @!P0 BRA `(.L_x_9)
   -:-:-:Y:05        /*00e0*/                   BRA `(.L_x_2)
"""


def test_the_way_of_a_whole_tile_through_a_loop():
    loop = find_loop(LOOP, "GMMA")
    assert [x.name for x in loop.instructions] == ["SYNCS", "BRA", "HGMMA", "WARPGROUP", "BRA", "FADD", "BRA"]
    assert loop.instructions[5].waits == (1,)
    assert loop.products == 64
    # The poll, 22 cycles after its start; the branch; a product and its latency; what follows.
    assert loop.cycles == 22 + 5 + (64 + 40) + 2 + 5 + 4 + 5
    assert scheduler_cycles([loop, loop]) == 14


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    ("kernel", "dtype", "page_size", "least_share"),
    [
        ("decode", "bfloat16", 16, 1.0),
        pytest.param("decode", "int8", 64, 1.0, marks=pytest.mark.long),
        pytest.param("decode", "float8_e4m3fn", 16, 1.0, marks=pytest.mark.long),
        ("rows", "bfloat16", 16, 0.86),
        pytest.param("rows", "int8", 64, 0.64, marks=pytest.mark.long),
        pytest.param("rows", "float8_e4m3fn", 16, 0.75, marks=pytest.mark.long),
    ],
)
def test_the_schedule_keeps_the_hardware_busy(kernel, dtype, page_size, least_share):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the compiler of GPUs is not installed")
    if disassembler() is None:
        pytest.skip("NVIDIA's disassembler is not installed")
    assert measure(Case(kernel, dtype, page_size))["share"] >= least_share
