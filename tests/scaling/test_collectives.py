"""What is read out of the text of a compiled program."""

import pytest

from opendet_jax.scaling.program import Array, Collective, collectives, summary

PROGRAM = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%round (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %inner = f32[4,8]{1,0} call(%x), to_apply=%helper
  ROOT %next = (s32[], f32[4,8]) tuple(%i, %inner)
}

%helper (x: f32[4,8]) -> f32[4,8] {
  ROOT %moved = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%left (x: f32[4]) -> f32[4] {
  ROOT %none = f32[4]{0} negate(%x)
}

%right (x: f32[4]) -> f32[4] {
  ROOT %total = f32[5]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%choice (state: f32[4]) -> f32[4] {
  ROOT %either = f32[4]{0} conditional(%i, %x, %x), branch_computations={%left, %right}
}

%choice_of_old (state: f32[4]) -> f32[4] {
  ROOT %either = f32[4]{0} conditional(%i, %x, %x), true_computation=%left, false_computation=%gatherer
}

%gatherer (x: f32[4]) -> f32[4] {
  ROOT %together = f32[8]{0} all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %summed = (f32[4,8]{1,0}, bf16[16]{0}) all-reduce(%p, %q), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %gather = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[8,8]{1,0} all-gather-done(%gather)
  %scattered = f32[1,8]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %all = pred[3]{0} all-reduce(%r), replica_groups={}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %chosen = f32[4] while(%t), condition=%until, body=%choice
  %chosen_too = f32[4] while(%t), condition=%until, body=%choice_of_old
  ROOT %loop = (s32[], f32[4,8]) while(%t), condition=%until, body=%round
}
"""


def test_kinds_groups_shapes_and_loops():
    found = {(c.kind, c.group): c for c in collectives(PROGRAM, 8)}
    assert found == {
        ("collective-permute", 2): Collective("collective-permute", (Array("f32", (4, 8)),), 2, True),
        ("all-reduce", 4): Collective("all-reduce", (Array("f32", (4, 8)), Array("bf16", (16,))), 4, False),
        ("all-gather", 4): Collective("all-gather", (Array("f32", (8, 8)),), 4, False),
        ("reduce-scatter", 4): Collective("reduce-scatter", (Array("f32", (1, 8)),), 4, False),
        ("all-reduce", 2): Collective("all-reduce", (Array("f32", (5,)),), 2, True),
        ("all-gather", 2): Collective("all-gather", (Array("f32", (8,)),), 2, True),
        ("all-reduce", 8): Collective("all-reduce", (Array("pred", (3,)),), 8, False),
    }


@pytest.mark.parametrize(
    ("kind", "group", "size", "sent"),
    [  # 4 × 8 float32 of each result: 128 bytes
        ("all-reduce", 4, 128, 2 * 128 * 3 / 4),
        ("all-gather", 4, 128, 128 * 3 / 4),
        ("reduce-scatter", 4, 512, 512 * 3 / 4),
        ("collective-permute", 2, 128, 128),
    ],
)
def test_bytes_that_a_ring_must_send(kind, group, size, sent):
    one = Collective(kind, (Array("f32", (4, 8)),), group, False)
    assert (one.bytes, one.sent) == (size, sent)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{}", 8),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[4,2]T(1,0)", 2),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", 8),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", 2),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], device_ids=([2,2,2]T(1,0,2)) {'axis_0','axis_2'}", 4),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ],
)
def test_the_forms_of_groups(groups, size):
    program = PROGRAM.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", f"replica_groups={groups}", 1)
    (first,) = (c for c in collectives(program, 8) if Array("bf16", (16,)) in c.results)
    assert first.group == size


def test_a_form_of_groups_that_is_not_known_is_no_guess():
    with pytest.raises(ValueError, match="not known: <8>, to_apply=%add"):
        collectives(PROGRAM.replace("replica_groups={}", "replica_groups=<8>"), 8)


def test_a_scatter_that_is_started_and_done_elsewhere():
    """Its type has what goes in, and then what comes out."""
    line = "  %s = ((f32[16,8]{1,0}, f32[4]{0}), (f32[4,8]{1,0}, f32[1]{0})) reduce-scatter-start(%p, %q), "
    program = PROGRAM.replace(
        "ENTRY %main", "%unused (x: f32[4]) -> f32[4] {\n" + line + "replica_groups={{0,1,2,3}}\n}\n\nENTRY %main"
    )
    (found,) = (c for c in collectives(program, 8) if len(c.results) == 2 and c.kind == "reduce-scatter")
    assert found == Collective("reduce-scatter", (Array("f32", (4, 8)), Array("f32", (1,))), 4, False)
    assert found.bytes == 4 * (16 * 8 + 4)


def test_summary():
    counted = summary(collectives(PROGRAM, 8))
    assert counted["all-reduce"]["count"] == 3
    assert counted["all-reduce"]["bytes"] == 4 * 32 + 2 * 16 + 3 + 4 * 5
    assert counted["all-reduce"]["in_loops"] == 1
    assert counted["collective-permute"]["in_loops"] == 1
    assert "all-to-all" not in counted
