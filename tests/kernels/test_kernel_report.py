"""What the Triton kernels compile to for GPUs that are not here: in a process of its own, without the interpreter."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import io, json, torch
torch.set_default_dtype(torch.bfloat16)  # which decides nothing: vectors are planned for the logits' own type
from rich.console import Console
from fastsnap.kernels import report
variants = {architecture: report.variants(architecture) for architecture in report.ARCHITECTURES}
found = {}
for architecture, compiled_variants in variants.items():
    for name, compiled in compiled_variants.items():
        facts = {"registers": compiled.registers, "occupancy": compiled.occupancy, "stack": compiled.stack_bytes}
        facts |= {"loads": compiled.widths("LDG"), "stores": compiled.widths("STG"), "spills": compiled.spills}
        facts |= {"instructions": sorted(set(compiled.instructions)), "barriers": compiled.barriers}
        if name.startswith("update"):
            facts["bytes"] = report.bytes_per_parameter(compiled)
        else:
            facts["bytes"] = [report.bytes_per_logit(compiled), report.bytes_of_statistics(compiled)]
        found[f"{name} sm_{architecture}"] = facts
ways = {
    f"{dtype}, {members} members, labels {labels}, probabilities {probabilities}": report.compile_averaging(
        90, 100, members=members, dtype=dtype, labels=labels, probabilities=probabilities
    )
    for dtype, members in (("fp32", 1), ("fp32", 5), ("bf16", 5), ("fp16", 5), ("fp64", 5))
    for labels, probabilities in ((True, True), (True, False), (False, True), (False, False))
    if dtype == "fp32" or labels is probabilities
}
ways |= {
    f"fp64, 21841 classes, sm_{architecture}": report.compile_averaging(architecture, 21841, dtype="fp64")
    for architecture in report.ARCHITECTURES
}
shown = io.StringIO()
Console(file=shown, width=80).print(report.table(variants))
spills = {name: compiled.spills for name, compiled in ways.items()}
print(json.dumps({"facts": found, "table": shown.getvalue(), "spills": spills}))
"""
UPDATES = ("update", "update, bf16 gradient", "update, all options")
AVERAGINGS = ("averaging, C=2 M=64", "averaging, C=100", "averaging, C=1000", "averaging, C=21841")
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(report):
    return report["facts"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_momentum_and_gradient_move_in_128_bits(compiled, architecture):
    facts = compiled[f"update sm_{architecture}"]
    assert facts["loads"].count(128) == 3
    assert facts["stores"].count(128) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "floor"), list(zip(UPDATES, (20, 18, 30), strict=True)))
def test_update_moves_the_least_possible_bytes(compiled, name, floor, architecture):
    assert compiled[f"{name} sm_{architecture}"]["bytes"] == floor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", UPDATES)
def test_update_leaves_room_for_all_threads(compiled, name, architecture):
    facts = compiled[f"{name} sm_{architecture}"]
    assert facts["registers"] <= 32
    assert facts["occupancy"] == 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", UPDATES + AVERAGINGS)
def test_nothing_spills_and_nothing_is_fp64(compiled, name, architecture):
    facts = compiled[f"{name} sm_{architecture}"]
    assert facts["spills"] == 0
    # Conversions to and from integers of 64 bits are not arithmetic in fp64; DADD, DMUL, DFMA, DSETP are.
    assert not [i for i in facts["instructions"] if i.startswith(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"))]
    assert not [i for i in facts["instructions"] if i.split(".")[0] in ("F2F", "F2I", "I2F") and ".F64" in i]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", UPDATES)
def test_the_clock_is_turned_after_all_warps_have_read_it(compiled, name, architecture):
    assert compiled[f"{name} sm_{architecture}"]["barriers"] == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", AVERAGINGS)
def test_averaging_loads_each_logit_once_unless_a_row_takes_several_blocks(compiled, name, architecture):
    # Three passes over the logits; averaged probabilities are loaded, stored and loaded for the label's rank.
    per_logit = 6 * 4 if name == "averaging, C=21841" else 4
    assert compiled[f"{name} sm_{architecture}"]["bytes"] == [per_logit, 36]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_several_blocks_wait_before_averages_are_read_or_overwritten(compiled, architecture):
    barriers = [compiled[f"{name} sm_{architecture}"]["barriers"] for name in AVERAGINGS]
    assert barriers == [0, 0, 0, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["averaging, C=100", "averaging, C=1000"])
def test_logits_move_in_128_bits(compiled, name, architecture):
    assert compiled[f"{name} sm_{architecture}"]["loads"].count(128) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", AVERAGINGS)
def test_averaging_leaves_room_for_three_programs_of_256_threads(compiled, name, architecture):
    assert compiled[f"{name} sm_{architecture}"]["occupancy"] >= 0.375


def test_averaging_compiles_for_every_type_of_logits_with_and_without_labels_and_probabilities(report):
    assert len(report["spills"]) == 17
    assert set(report["spills"].values()) == {0}


def test_table_fits_80_columns(report):
    lines = report["table"].splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in report["table"]
    for name in UPDATES + AVERAGINGS:
        rows = [line for line in lines if line.startswith(f"{name} ")]
        assert [f"sm_{architecture}" in row for row, architecture in zip(rows, ARCHITECTURES, strict=True)]
    widest = {name: next(line for line in lines if line.startswith(name)) for name in AVERAGINGS}
    assert "128, 32" in widest["averaging, C=100"]
    assert "32, 32" in widest["averaging, C=21841"]
    assert "24 + 36" in widest["averaging, C=21841"]
