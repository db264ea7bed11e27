"""What `benchmarks.tpu_static` reads in the text of a compiled step."""

import collections
import importlib.util
import types

import pytest

from benchmarks.tpu_static.cases import StaticCase
from benchmarks.tpu_static.compile import scheduled_programs
from benchmarks.tpu_static.hlo import parse_module
from benchmarks.tpu_static.peers import _module, tokamax
from benchmarks.tpu_static.program import WORD, parse
from benchmarks.tpu_static.step import choose_branch, function, purpose

TEXT = """HloModule jit_one, is_scheduled=true

FileNames
1 "/a/paged_jax/decoding/step.py"
2 "/a/paged_jax/sampling/draw.py"
3 "/a/paged_jax/models/parts.py"

FunctionNames
1 "step"
2 "draw.<locals>.choose"
3 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%fused.1 (p.1: s32[8]) -> s32[8] {
  %p.1 = s32[8]{0:T(128)} parameter(0)
  ROOT %neg.1 = s32[8]{0:T(128)S(1)} negate(%p.1), metadata={op_name="jit(one)/neg" stack_frame_id=1}
}

%fused.2 (p.2: s32[8]) -> s32[8] {
  %p.2 = s32[8]{0:T(128)} parameter(0)
  ROOT %neg.2 = s32[8]{0:T(128)S(1)} negate(%p.2), metadata={op_name="jit(one)/other/neg" stack_frame_id=2}
}

%fused.3 (p.3: s32[8]) -> s32[8] {
  %p.3 = s32[8]{0:T(128)S(1)} parameter(0)
  ROOT %neg.3 = s32[8]{0:T(128)S(1)} negate(%p.3)
}

%body (b.1: (s32[], s32[8])) -> (s32[], s32[8]) {
  %b.1 = (s32[]{:T(128)}, s32[8]{0:T(128)}) parameter(0)
  %dot.1 = s32[8]{0:T(128)} fusion(%b.1), calls=%fused.1, metadata={op_name="jit(one)/while/body/dot_general" stack_frame_id=3}
  ROOT %t.1 = (s32[]{:T(128)}, s32[8]{0:T(128)}) tuple(%b.1, %dot.1)
}

%counts (c.1: (s32[], s32[8])) -> pred[] {
  %c.1 = (s32[]{:T(128)}, s32[8]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  %n.1 = s32[]{:T(128)} constant(32)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%idle (x.1: s32[8]) -> s32[8] {
  ROOT %x.1 = s32[8]{0:T(128)} parameter(0)
}

%busy (y.1: s32[8]) -> s32[8] {
  %y.1 = s32[8]{0:T(128)} parameter(0)
  ROOT %drawn.1 = s32[8]{0:T(128)} fusion(%y.1), calls=%fused.2, metadata={op_name="jit(one)/cond/branch_1_fun/neg" stack_frame_id=2}
}

ENTRY %main (a.1: s32[8]) -> s32[8] {
  %a.1 = s32[8]{0:T(128)} parameter(0)
  %start.1 = (s32[]{:T(128)}, s32[8]{0:T(128)}) tuple(%a.1, %a.1)
  %loop.1 = (s32[]{:T(128)}, s32[8]{0:T(128)}) while(%start.1), condition=%counts, body=%body
  %one.1 = s32[8]{0:T(128)S(1)} fusion(%a.1), kind=kLoop, calls=%fused.1, metadata={op_name="jit(one)/neg" stack_frame_id=1}
  %two.1 = s32[8]{0:T(128)S(1)} fusion(%a.1), kind=kLoop, calls=%fused.2, metadata={op_name="jit(one)/neg"}
  %three.1 = s32[8]{0:T(128)S(1)} fusion(%one.1), kind=kLoop, calls=%fused.3
  ROOT %choice.1 = s32[8]{0:T(128)} conditional(%a.1, %three.1, %three.1), branch_computations={%idle, %busy}
}
"""  # noqa: E501  as the compiler prints it


def executed(working: set[str]):
    module = parse_module(TEXT)
    return {x.name: (x, times) for x, times in module.executed(lambda x: choose_branch(module, working, x))}


def test_a_counted_loop_runs_as_often_as_it_counts_and_a_branch_runs_where_there_is_work():
    quiet, busy = executed(set()), executed({"draw.<locals>.choose"})
    assert quiet["dot.1"][1] == 32 and quiet["one.1"][1] == 1
    assert "drawn.1" not in quiet and busy["drawn.1"][1] == 1


def test_a_loop_that_counts_to_no_constant_runs_once():
    module = parse_module(TEXT.replace("constant(32)", "parameter(1)"))
    assert dict((x.name, times) for x, times in module.executed(lambda _: 0))["dot.1"] == 1


def test_a_program_is_for_what_its_source_says():
    found = executed({"draw.<locals>.choose"})
    assert [purpose(found[name][0]) for name in ("dot.1", "one.1", "two.1", "drawn.1")] == [
        "weights", "page table, plan, rows", "other", "drawing"
    ]  # fmt: skip
    drawn = found["drawn.1"][0]
    assert drawn.source == (
        "/a/paged_jax/sampling/draw.py:9 draw.<locals>.choose",
        "/a/paged_jax/decoding/step.py:7 step",
    )
    assert function(drawn) == "draw.py draw.<locals>.choose"


def test_programs_are_equal_but_for_names_and_notes_and_not_where_their_operands_lie_elsewhere():
    one, two, three = (executed(set())[name][0] for name in ("one.1", "two.1", "three.1"))
    assert one.content == two.content != three.content


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation: another libtpu may write its dumps differently"):
        parse_module("HloModule jit_one\n")


def test_divisions_are_executed():
    bundle = "{:#x}   :  {{ %s7_s1 = smov 4294967290 }}\n"
    text = "= control target key end\n" + bundle.format(1) + (
        "0x2   :  { %s8_s2 = smulhi.u32 3435973837, %s7_s1 ;; %12 = sdivrem.u32 %s7_s1, 7 /* kRem */ }\n"
        "0x3   :  { %s9_s3 = spop.drf %12 }\n"
    )  # fmt: skip
    program = parse(text)
    registers = collections.defaultdict(int)
    for step in program.steps:
        step(registers, {}, None)
    assert registers["s2"] & WORD == 4294967290 * 3435973837 >> 32
    assert registers["s3"] == 4294967290 % 7 and not program.unknown


def test_a_scalar_operand_is_its_word():
    text = (
        "= control target key end\n"
        "0x1   :  { %s7_s1 = inlined_call_operand.<no memory space> [shape: s32[1], index: 18, kind: input] }\n"
        "0x2   :  { %s8_s2 = sadd.s32 1, %s7_s1 }\n"
    )
    registers = collections.defaultdict(int)
    for step in parse(text).steps:
        step(registers, {}, types.SimpleNamespace(operands={18: [41]}))
    assert registers["s2"] == 42


def test_scheduled_programs_are_found_by_a_part_of_their_names(tmp_path):
    kernel, fusion = "1-paged_write.1-01-packed-bundles-post-ra.txt", "2-schedule-01-packed-bundles-post-ra.txt"
    for name in (kernel, fusion, "1-paged_write.1-00-schedule-analysis_packed-bundles-post-ra.txt", "1-hlo.txt"):
        (tmp_path / name).touch()
    assert {path.name for path in scheduled_programs(tmp_path)} == {kernel, fusion}
    assert [path.name for path in scheduled_programs(tmp_path, "paged_write")] == [kernel]


def test_a_peer_that_is_not_installed_says_so():
    with pytest.raises(ModuleNotFoundError, match="no_such_peer is not installed for .*: install it beside paged_jax"):
        _module("no_such_peer", "kernels")


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
def test_tokamax_plans_every_block_of_512_keys_for_the_kernel_of_its_kind():
    words = tokamax(StaticCase("two rows", (1000, 300), page_size=64), "v7x").words
    decode = words["RPAd"]
    assert decode[18] == [1]  # a step of 8 items
    assert decode[5] == [0, 0, 1, -1, -1, -1, -1, -1] and decode[7] == [0, 1, 0, 0, 0, 0, 0, 0]  # rows, blocks
    assert words["RPAp"][18] == words["RPAm"][18] == [0]
    assert words["rpa_metadata_schedule"] == {0: [0, 1, 2], 1: [999, 299], 2: [999, 299], 3: [1, 1], 4: [2, 2, 2]}
