"""The static performance model: a warp followed through its machine code, and what is made of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from benchmarks.gates import beside, emulate, launches, lines, pipes, plan, prediction, sass
from benchmarks.gates.effects import step
from benchmarks.gates.model import H200, library_time, predict
from benchmarks.gates.passes import Unit
from benchmarks.gates.registers import LANES, Registers
from dla_fast.bench import Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = emulate.Memory(far=700.0, near=250.0)


def assembled(*instructions: str, stall: int = 2, control: dict[int, int] | None = None) -> list[sass.Instruction]:
    """Instructions at addresses 0, 16 ..., as the disassembler prints them; ``control``: bits of some of them."""
    text = []
    for i, line in enumerate(instructions):
        # Every barrier field says "none", unless told.
        high = ((control or {}).get(i, stall | 7 << 5 | 7 << 8)) << 41
        text.append(f"/*{16 * i:04x}*/  {line} ;  /* 0x{0:016x} */\n  /* 0x{high:016x} */")
    return sass.parse("\n".join(text))


def bank(*words: int) -> bytes:
    """Bank 0 with 32-bit parameters."""
    return bytes(launches.PARAMETERS) + struct.pack(f"<{len(words)}I", *[w & 0xFFFFFFFF for w in words]) + bytes(64)


def run(code: list[sass.Instruction], *words: int, warps: int = 4) -> emulate.Trace:
    return emulate.run(code, bank(*words), (8, 1, 1), warps, MEMORY)


def after(*instructions: str, words: tuple[int, ...] = ()) -> Registers:
    """Registers after instructions that do not jump."""
    w = Registers(bank(*words), {"SR_TID.X": tuple(range(LANES)), "SR_CTAID.X": 5})
    for ins in assembled(*instructions):
        w.guard = True if ins.guard is None else w.predicate(ins.guard)
        step(w, ins)
    return w


def test_an_instruction_is_read_with_its_schedule():
    control = 5 | 2 << 5 | 7 << 8 | 0b100001 << 11
    (ins,) = assembled("@!P3 LDG.E.128 R4, desc[UR6][R2.64+0x10]", control={0: control})
    assert (ins.op, ins.mods, ins.width) == ("LDG", ("E", "128"), 16)
    assert ins.guard is not None
    assert ins.guard.negative
    assert ins.guard.index == 3
    assert (ins.stall, ins.write, ins.read, ins.wait) == (5, 2, sass.NO_BARRIER, 0b100001)
    assert sass.address_parts(ins.operands[1].text) == (("R2", "64"), ("0x10", ""))
    assert sass.operand("-c[0x0][0x214]") == sass.Operand("constant", 0x214, True, False, False, "-c[0x0][0x214]")
    assert sass.operand("|R7|").magnitude
    assert sass.operand("~UR4").inverted


def test_a_loop_runs_as_often_as_its_argument_says():
    code = assembled(
        "MOV R1, RZ",
        "LDC R2, c[0x0][0x210]",
        "IADD3 R1, R1, 0x1, RZ",
        "FFMA R8, R8, R9, R8",
        "ISETP.GE.AND P0, PT, R1, R2, PT",
        "@!P0 BRA 0x20",
        "EXIT",
    )
    trace = run(code, 12)
    assert trace.loops == {(0x20, 0x50): 11}
    assert trace.issued == 2 + 4 * 12 + 1
    assert trace.trips() == [(11.0, 4.0, 0.0, 0.0)]
    # The comparison goes to a pipe of half the rate, the product does not.
    assert trace.pipes["integer"] == 2 * (12 + 12)


def test_division_as_the_compiler_writes_it():
    def divide(a: int, b: int) -> int:
        w = after(
            "LDC R13, c[0x0][0x210]",
            "LDC R9, c[0x0][0x214]",
            "I2F.U32.RP R0, R9",
            "MUFU.RCP R0, R0",
            "IADD3 R4, R0, 0xffffffe, RZ",
            "F2I.FTZ.U32.TRUNC.NTZ R5, R4",
            "MOV R4, RZ",
            "IADD3 R2, RZ, -R5, RZ",
            "IMAD R7, R2, R9, RZ",
            "IMAD.HI.U32 R5, R5, R7, R4",
            "IMAD.HI.U32 R2, R5, R13, RZ",
            "IADD3 R7, RZ, -R2, RZ",
            "IMAD R0, R9, R7, R13",
            "ISETP.GE.U32.AND P0, PT, R0, R9, PT",
            "@P0 IADD3 R0, R0, -R9, RZ",
            "@P0 IADD3 R2, R2, 0x1, RZ",
            "ISETP.GE.U32.AND P1, PT, R0, R9, PT",
            "@P1 IADD3 R2, R2, 0x1, RZ",
            words=(a, b),
        )
        return int(w.files["R"][2])

    for a, b in ((0, 7), (6, 7), (7, 7), (802816, 3136), (802815, 3136), (2**31 - 1, 3), (123456789, 49)):
        assert divide(a, b) == a // b, (a, b)


def test_integers_carry_shift_and_choose():
    w = after(
        "LDC.64 R2, c[0x0][0x210]",
        "IADD3 R4, P1, R2, 0x1, RZ",
        "IADD3.X R5, R3, RZ, RZ, P1, !PT",
        "IMAD.WIDE R6, R4, 0x10, R2",
        "S2R R8, SR_TID.X",
        "LOP3.LUT R9, R8, 0x3, RZ, 0xc0, !PT",
        "SHF.R.S32.HI R10, RZ, 0x1f, R11",
        "ISETP.LT.U32.AND P2, PT, R8, 0x4, PT",
        "SEL R12, R8, 0x7, P2",
        "LEA.HI R13, R2, R2, RZ, 0x6",
        "SHFL.IDX PT, R14, R8, 0x3, 0x1f",
        "PRMT R15, R2, 0x5410, R3",
        "ISETP.GE.AND P3, PT, R2, RZ, PT",
        "ISETP.GE.AND.EX P4, PT, R3, RZ, PT, P3",
        words=(0xFFFFFFFF, 2),
    )
    r = w.files["R"]
    assert (r[4], r[5]) == (0, 3)
    assert (r[6], r[7]) == (0xFFFFFFFF, 2)
    assert r[9] == tuple(i & 3 for i in range(LANES))
    assert r[10] is None, "what comes from nowhere is not known"
    assert r[12] == tuple(i if i < 4 else 7 for i in range(LANES))
    assert r[13] == (0xFFFFFFFF + 63) & 0xFFFFFFFF
    assert r[14] == 3
    assert r[15] == 0x0002FFFF
    assert w.files["P"][3] is False
    assert w.files["P"][4] is True


def test_predicates_decide_what_an_access_moves():
    code = assembled(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE.U32 R4, R0, 0x10, R2",
        "ISETP.LT.U32.AND P0, PT, R0, 0x8, PT",
        "LDG.E.128 R8, desc[UR4][R4.64]",
        "@P0 STG.E.128 desc[UR4][R4.64], R8",
        "@!P0 STG.E.128 desc[UR4][R4.64], R8",
        "EXIT",
    )
    address = 1 << pipes.SPACE
    trace = run(code, address & 0xFFFFFFFF, address >> 32)
    moved = trace.moved[1]
    assert moved.asked == 512 + 128 + 384
    assert (moved.requests, moved.sectors, moved.stored, moved.torn) == (3, 32, 512, 0)
    assert trace.counts["load.16"] == 1
    assert trace.counts["store.16"] == 2


def test_a_store_of_every_other_value_tears_its_sectors():
    code = assembled(
        "S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE.U32 R4, R0, 0x8, R2",
        "STG.E desc[UR4][R4.64], R8", "EXIT",
    )  # fmt: skip
    trace = run(code, 0, 1 << pipes.SPACE - 32)
    assert (trace.moved[1].sectors, trace.moved[1].torn) == (8, 4)


def test_time_is_the_assemblers_schedule_and_what_loads_wait_for():
    # The load holds barrier 0, which the addition waits for.
    none = 1 | 7 << 5 | 7 << 8
    load, wait = 1 | 0 << 5 | 7 << 8, 4 | 7 << 5 | 7 << 8 | 1 << 11
    body = ("LDC.64 R2, c[0x0][0x210]", "LDG.E R4, desc[UR4][R2.64]", "IADD3 R4, R4, R4, RZ", "EXIT")
    waiting = run(assembled(*body, control={0: none, 1: load, 2: wait, 3: none}), 0, 1 << pipes.SPACE - 32)
    going_on = run(assembled(*body, control={0: none, 1: none, 2: none, 3: none}), 0, 1 << pipes.SPACE - 32)
    assert 700 < waiting.cycles < 740
    assert going_on.cycles < 20


def test_threads_vote():
    w = after("S2R R0, SR_TID.X", "ISETP.EQ.AND P0, PT, R0, 0x3, PT", "VOTEU.ANY UP0, P0", "VOTEU.ALL UP1, P0")
    assert (w.files["UP"][0], w.files["UP"][1]) == (True, False)


def test_programs_that_differ_stand_for_each_other():
    assert launches.spread(1) == [0]
    assert launches.spread(2) == [0, 1]
    assert launches.spread(100) == [12, 37, 62, 87]
    one, other = (emulate.Trace(cycles=c, moved={i: emulate.Moved(sectors=8)}) for i, c in ((1, 10.0), (2, 30.0)))
    mean = launches.mean_of([one, other])
    assert mean.cycles == 20
    assert [mean.moved[i].sectors for i in (1, 2)] == [4, 4]


def test_asynchronous_copies_are_waited_for_by_the_group():
    copy = "LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64]"
    start = ("S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", copy, "LDGDEPBAR")
    one_left = run(assembled(*start, copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1", "EXIT"), 0, 1 << pipes.SPACE - 32)
    none_left = run(
        assembled(*start, *["IADD3 R9, R9, R9, RZ"] * 50, copy, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "EXIT"),
        0, 1 << pipes.SPACE - 32,
    )  # fmt: skip
    assert 700 < one_left.cycles < 740
    assert none_left.cycles > 790


def test_a_branch_on_memory_is_an_error_that_names_it():
    code = assembled(
        "LDC.64 R2, c[0x0][0x210]", "LDG.E R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R4, RZ, PT",
        "@P0 BRA 0x0", "EXIT",
    )  # fmt: skip
    with pytest.raises(emulate.UnknownBranch, match=r"0x0030: @P0 BRA 0x0: it depends"):
        run(code, 0, 1 << pipes.SPACE - 32)
    # A division's slow path is a call behind such a branch, and not taken.
    code = assembled("FCHK P0, R4, R5", "@!P0 BRA 0x40", "MOV R2, 0x40", "CALL.REL.NOINC 0x50", "EXIT", "RET 0x0")
    assert run(code).issued == 3
    # A whole loop is none, whatever it calls.
    loop = ("FCHK P0, R4, R5", "@!P0 BRA 0x230", "CALL.REL.NOINC 0x50", *["NOP"] * 32, "EXIT")
    with pytest.raises(emulate.UnknownBranch, match=r"0x0010: @!P0 BRA 0x230"):
        run(assembled(*loop))
    with pytest.raises(emulate.UnknownBranch, match="no end"):
        emulate.Emulator(assembled("BRA 0x0"), Registers(bank(), {}), 4, MEMORY).run(most=100)


def test_parameters_lie_as_the_device_reads_them():
    def parameter(name: str, annotation: str = "") -> SimpleNamespace:
        return SimpleNamespace(name=name, annotation_type=annotation, is_constexpr=False)

    names = ("x", "one", "absent", "n", "many", "double", "eps", "pair")
    kernel = SimpleNamespace(
        params=[parameter(n, "fp64" if n == "double" else "") for n in names]
        + [SimpleNamespace(name="B", annotation_type="", is_constexpr=True)]
    )
    x = torch.empty(10, dtype=torch.bfloat16, device="meta")
    args = (x, 1, None, -7, 2**40, 0.5, 0.25, (x, 3, 1))
    one = SimpleNamespace(kernel=kernel, grid=(6, 2), args=args, config=SimpleNamespace(num_warps=8))
    made, operands = launches.constants(one)
    assert struct.unpack_from("<6I", made) == (256, 1, 1, 6, 2, 1)
    # Every parameter on a multiple of its size; what is 1 or None is compiled in.
    layout = "<Qi4xqdf4xQi"
    assert struct.unpack_from(layout, made, launches.PARAMETERS) == (1 << 40, -7, 2**40, 0.5, 0.25, 2 << 40, 3)
    assert operands == [20, 20]
    with pytest.raises(TypeError, match="str"):
        launches.constants(SimpleNamespace(**{**vars(one), "args": ("text", *args[1:])}))


FEATURES = launches.Features(
    kernel="k", programs=132 * 4, warps=8, registers=64, shared=0, resident=2, cycles=10_000.0, issued=1000, pipes={},
    matrix=0.0, banks=0.0, lines=0.0, asked=0.0, bytes=1e6, torn=0.0, wide=1.0,
)  # fmt: skip


def test_the_model_adds_up():
    time = predict(FEATURES, H200)
    # Four programs a processor, two at a time.
    assert time.latency == pytest.approx(2 * (10_000 + H200.start) / H200.clock)
    assert time.parts["memory"] == pytest.approx(1e6 / H200.copy)
    assert time.parts["issue"] == pytest.approx(4 * 1000 * 2 / H200.slots / H200.clock)
    assert max(time.latency, *time.parts.values()) < time.total < time.latency + sum(time.parts.values())
    assert time.bound == "latency"
    streaming = predict(dataclasses.replace(FEATURES, bytes=1e9, cycles=100.0), H200)
    assert streaming.bound == "memory"
    assert streaming.total == pytest.approx(1e9 / H200.copy + H200.launch, rel=0.05)
    torn = predict(dataclasses.replace(FEATURES, bytes=1e9, torn=1e9, cycles=100.0), H200)
    assert torn.total > 2.9 * streaming.total
    # A grid that leaves processors idle is no faster than one program.
    few = predict(dataclasses.replace(FEATURES, programs=3), H200)
    assert few.latency == pytest.approx((10_000 + H200.start) / H200.clock)
    assert predict(dataclasses.replace(FEATURES, matrix=5000.0), H200).bound == "matrix"
    assert library_time(1e9, 0.0, H200).total == pytest.approx(1e9 / H200.copy / 0.85 + H200.launch)
    slow, fast = (library_time(0.0, 1e12, H200, channels).total for channels in (64, 256))
    assert fast < slow


def test_the_model_reproduces_a_run_on_an_h200():
    """Features of the launches of the run's commit beside their times: no parameter drifts from what was measured."""
    kept = json.loads((RESULTS / "model" / "h200.json").read_text())
    assert kept["memory"] == {"far": H200.far, "near": H200.near, "port": H200.memory.port}, "features are of these"
    predicted, measured = [], []
    for row in kept["measured"]:
        times = [predict(launches.Features(**f), H200) for f in row["launches"]]
        predicted.append(1e6 * sum(t.total for t in times))
        measured.append(row["us"])
    apart = sorted(abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True))
    assert len(apart) == 87
    assert math.exp(apart[len(apart) // 2]) < 1.12, "half of them"
    assert math.exp(apart[int(0.9 * len(apart))]) < 1.35, "nine of ten"
    # The finalising kernels, of a few programs each, and sums of a few microseconds are what it knows least of.
    large = [abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True) if m > 10 and abs(m - 38.0) > 0.1]
    assert math.exp(max(large)) < 1.4
    agree = total = 0
    for i in range(len(measured)):
        for j in range(i):
            if abs(math.log(measured[i] / measured[j])) > 0.2:
                total += 1
                agree += (predicted[i] > predicted[j]) == (measured[i] > measured[j])
    assert agree > 0.95 * total, "the order of what is 20 % apart"


def works() -> list[plan.Work]:
    return plan.works()


def test_what_is_predicted():
    found = works()
    roots = [w for w in found if w.unit.case.op == "aggregate"]
    assert {w.kind for w in roots} == {"inference", "forward", "backward"}
    assert {w.unit.case.height for w in roots if w.unit.layout == "channels_last"} == {56, 28, 14, 7}
    assert {w.unit.case.height for w in roots if w.unit.layout == "contiguous"} == {14, 7}
    assert len([w for w in found if w.kind == "merge"]) == 3
    assert all(w.unit.batch == 256 for w in roots)
    for work in found:
        if work.kind != "maps":
            assert lines.line_of(work.kind, work.unit.layout, work.unit.case.height) is not None
    assert lines.line_of("forward: stage_kernel", "channels_last", 56) is None
    for rows in lines.LINES.values():
        assert rows[-1][0] == 0
        assert all(0 < line <= 1 and 0 < goal <= 1 for _, goal, line in rows)


def test_the_library_is_seen_where_it_serves():
    merge = next(w for w in works() if w.kind == "merge")
    calls = [s for s in plan.steps(merge) if isinstance(s, plan.LibraryCall)]
    assert [c.name for c in calls] == ["cat", "convolution"]
    k, n = sum(merge.unit.case.in_channels), merge.unit.case.out_channels
    assert calls[1].flops == 2.0 * merge.unit.pixels * 9 * k * n
    assert calls[1].channels == n
    from dla_fast.kernels import library

    assert library.DEVICE == "cuda", "meta stands for a GPU inside alone"


def test_the_floor_is_the_traffic_gates():
    case = Case("node", (256, 256), 256, 14, 14)
    unit = Unit(case, 256, torch.bfloat16, "channels_last")
    m, k, n = 256 * 14 * 14, 512, 256
    assert plan.floor_of(plan.Work(unit, "inference", "inference")) == (2.0 * m * (k + n), 2.0 * m * k * n)
    assert plan.floor_of(plan.Work(unit, "forward", "forward"))[0] == 2.0 * m * (k + 3 * n)
    assert plan.floor_of(plan.Work(unit, "backward", "backward")) == (2.0 * m * (6 * n + 2 * k), 4.0 * m * k * n)
    upsample = Unit(Case("up", (64,), 64, 8, 8, op="upsample", factor=2), 2, torch.bfloat16, "contiguous")
    assert plan.floor_of(plan.Work(upsample, "backward", "maps"))[0] == 2 * 2 * 64 * 16 * (2 + 4)


def test_a_run_is_put_beside_its_predictions_the_worst_first():
    case = Case("dla34.level2.root", (64, 64), 64, 56, 56)
    node = plan.Work(Unit(case, 256, torch.bfloat16, "channels_last"), "inference", "inference")
    maps = Case("maps", (64,), 64, 56, 56, op="batch_norm_act")
    tail = plan.Work(Unit(maps, 256, torch.bfloat16, "contiguous"), "forward", "maps")
    time = predict(FEATURES, H200)
    steps = [prediction.Predicted("inference_kernel", FEATURES, time)]
    of_tail = prediction.Prediction(
        "maps", ["tail_kernel"], "tail", "contiguous", "bfloat16", 256, 56, 0.9, 1.0, 0.9, "memory", False, None, None
    )
    measured = json.loads((RESULTS / "gpu-h200.json").read_text())
    rows = beside.compare([(node, steps, []), (tail, steps, [of_tail])], measured)
    assert [r.what for r in rows] == [
        "aggregate 64+64 -> 64 @ 56x56 batch 256 inference", "tail triton bfloat16 contiguous",
    ]  # fmt: skip
    assert rows[0].predicted == pytest.approx(1e6 * time.total)
    assert rows[0].measured == pytest.approx(145.486, abs=0.01)
    assert rows[1].ratio == pytest.approx(0.9274 / 0.9, rel=1e-3)
    calibration = beside.kept([(node, steps, []), (tail, steps, [of_tail])], measured, H200)
    assert [r["us"] for r in calibration["measured"]] == [145.49]
    assert launches.Features(**calibration["measured"][0]["launches"][0]) == FEATURES
    assert "2 measurements" in beside.table([(node, steps, []), (tail, steps, [of_tail])], measured)
