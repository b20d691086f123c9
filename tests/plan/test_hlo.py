"""A scheduled program small enough to count by hand, in the compiler's notation."""

import json
import math

import pytest

from llama_jax.plan import hlo

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
TEXT = """HloModule jit_step, is_scheduled=true

%%fused_product (p0: bf16[8,16], p1: bf16[16,8]) -> bf16[8,8] {
  %%p0 = bf16[8,16]{1,0} parameter(0)
  %%p1 = bf16[16,8]{1,0} parameter(1)
  ROOT %%convolution.1 = bf16[8,8]{1,0} convolution(%%p0, %%p1), dim_labels=bf_io->bf
}

%%all-reduce-scatter.1 (q0: bf16[16,8]) -> bf16[4,8] {
  %%q0 = bf16[16,8]{1,0} parameter(0)
  %%all-reduce.9 = bf16[16,8]{1,0} all-reduce(%%q0), replica_groups=[2,4]<=[8], to_apply=%%add
  ROOT %%dynamic-slice.1 = bf16[4,8]{1,0} dynamic-slice(%%all-reduce.9)
}

%%carried (t0: bf16[1,8]) -> bf16[2,8] {
  %%t0 = bf16[1,8]{1,0} parameter(0)
  ROOT %%all-gather.5 = bf16[2,8]{1,0} all-gather(%%t0), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%%beside (r0: bf16[4,16]) -> bf16[12,16] {
  %%r0 = bf16[4,16]{1,0} parameter(0)
  %%copy.9 = bf16[4,16]{1,0} copy(%%r0), CYCLES9
  ROOT %%all-gather.3 = bf16[12,16]{1,0} all-gather(%%copy.9), replica_groups=mesh['a'=3] {'a'}, dimensions={0}
}

%%async_computation (s0: bf16[4,16]) -> bf16[12,16] {
  %%s0 = bf16[4,16]{1,0} parameter(0)
  ROOT %%custom-call.1 = bf16[12,16]{1,0} custom-call(%%s0), custom_call_target="beside", called_computations={%%beside}
}

%%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %%constant.7 = s32[]{:T(128)} constant(32)
  %%c = (s32[], bf16[8,16]) parameter(0)
  %%get-tuple-element.1 = s32[] get-tuple-element(%%c), index=0
  ROOT %%compare.1 = pred[] compare(%%get-tuple-element.1, %%constant.7), direction=LT
}

%%body (b: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %%b = (s32[], bf16[8,16]) parameter(0)
  %%get-tuple-element.2 = s32[] get-tuple-element(%%b), index=0
  %%get-tuple-element.3 = bf16[8,16] get-tuple-element(%%b), index=1
  %%constant.8 = s32[] constant(2)
  %%add.1 = s32[] add(%%get-tuple-element.2, %%constant.8)
  %%all-gather-start.1 = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%%get-tuple-element.3), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(step)/ffn"}
  %%fusion.1 = bf16[8,8]{1,0} fusion(%%get-tuple-element.3, %%get-tuple-element.3), kind=kOutput, calls=%%fused_product, CYCLES100
  %%all-gather-done.1 = bf16[16,16]{1,0} all-gather-done(%%all-gather-start.1)
  %%fusion.2 = bf16[4,8]{1,0} fusion(%%fusion.1), kind=kCustom, calls=%%all-reduce-scatter.1
  %%copy.1 = bf16[8,16]{0,1} copy(%%get-tuple-element.3), CYCLES7
  ROOT %%tuple.1 = (s32[], bf16[8,16]) tuple(%%add.1, %%copy.1)
}

ENTRY %%main (x: bf16[8,16]) -> bf16[8,16] {
  %%x = bf16[8,16]{1,0} parameter(0)
  %%constant.9 = s32[] constant(4)
  %%tuple.2 = (s32[], bf16[8,16]) tuple(%%constant.9, %%x)
  %%while.1 = (s32[], bf16[8,16]) while(%%tuple.2), condition=%%condition, body=%%body
  %%multiply.1 = bf16[8,16]{1,0} multiply(%%x, %%x), CYCLES5
  %%all-gather.3.call-start = ((), (), s32[9]{0}) async-start(), async_execution_thread="sparsecore", calls=%%async_computation
  %%multiply.2 = bf16[8,16]{1,0} multiply(%%x, %%x), CYCLES11
  %%all-gather.3.call-update = ((bf16[4,16]{1,0}), bf16[12,16]{1,0}, s32[9]{0}) async-update(%%all-gather.3.call-start, %%x)
  %%multiply.3 = bf16[8,16]{1,0} multiply(%%x, %%x), CYCLES13
  %%all-gather.3.call-done = bf16[12,16]{1,0} async-done(%%all-gather.3.call-update)
  %%splash_mha_fwd.1 = (f32[8,128], bf16[8,16]) custom-call(%%x), custom_call_target="tpu_custom_call"
  %%all-reduce.2 = f32[2,3]{1,0} all-reduce(%%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%%add
  %%async-collective-start.1 = bf16[2,8]{1,0} fusion(%%x), kind=kCustom, calls=%%carried
  %%reduce-scatter.1 = f32[1,2]{1,0} reduce-scatter(%%x), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%%add
  ROOT %%get-tuple-element.4 = bf16[8,16] get-tuple-element(%%while.1), index=1
}
"""
TEXT = TEXT.replace("%%", "%")
for number in (100, 11, 13, 9, 7, 5):
    TEXT = TEXT.replace(f"CYCLES{number}", CYCLES % number)
TURNS = (32 - 4) // 2  # from 4 to 32 in steps of 2


@pytest.fixture(scope="module")
def program():
    return hlo.read(TEXT)


def test_a_loop_counts_as_often_as_it_turns(program):
    assert program.times() == {"main": 1, "body": TURNS}
    assert hlo.cycles(program) == {
        "matmul": 100 * TURNS,
        "elementwise": 5 + 11 + 13,
        "copy": 7 * TURNS,
    }


def test_collectives_have_bytes_parts_and_cover(program):
    gather, beside, scatter, carried, reduce, small = sorted(
        hlo.collectives(program), key=lambda c: -c.bytes
    )
    assert gather == hlo.Collective(
        "all-gather", 16 * 16 * 2, TURNS, 4, True, 100.0, True, "jit(step)/ffn"
    )
    # On a sparse core: from the moment that it has its data; what it does there is in no cycles.
    assert beside == hlo.Collective("all-gather", 12 * 16 * 2, 1, 3, True, 13.0, False, "")
    assert scatter == hlo.Collective("reduce-scatter", 16 * 8 * 2, TURNS, 4, False, 0.0, True, "")
    assert carried == hlo.Collective("all-gather", 2 * 8 * 2, 1, 2, True, math.inf, False, "")
    assert small == hlo.Collective("reduce-scatter", 2 * 1 * 2 * 4, 1, 2, False, 0.0, False, "")
    assert reduce == hlo.Collective("all-reduce", 2 * 3 * 4, 1, 8, False, 0.0, False, "")


def test_kernels_are_counted_by_name(program):
    assert hlo.kernels(program) == {"splash_mha_fwd": 1}


def test_figures_of_a_program_survive_json(program):
    """As which the compiler's process hands them over; what hides within products hides for ever."""
    found = hlo.collectives(program)
    assert any(math.isinf(one.covered) for one in found)
    compiled = hlo.Compiled(1.5, 1.0, 0.5, hlo.cycles(program), 7.0, 0.0, found, 2.0)
    assert hlo.Compiled.from_dict(json.loads(json.dumps(compiled.to_dict()))) == compiled
