"""What the Triton kernels compile to for GPUs that are not here: in a process of its own, without the interpreter."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import dataclasses, json, torch
from fastsnap.kernels import report
found = {}
for architecture in report.ARCHITECTURES:
    for name, compiled in {
        "update": report.compile_update(architecture),
        "update bf16": report.compile_update(architecture, torch.bfloat16),
        "update extras": report.compile_update(architecture, extras=True),
        "averaging": report.compile_averaging(architecture, 100),
    }.items():
        facts = {"registers": compiled.registers, "occupancy": compiled.occupancy, "stack": compiled.stack_bytes}
        facts |= {"loads": compiled.widths("LDG"), "stores": compiled.widths("STG"), "spills": compiled.spills}
        facts |= {"instructions": sorted(set(compiled.instructions)), "accesses": compiled.accesses}
        facts |= {"bytes": report.bytes_per_parameter(compiled) if "update" in name else None}
        found[f"{name} sm_{architecture}"] = facts
print(json.dumps(found))
"""
ARCHITECTURES = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_momentum_and_gradient_move_in_128_bits(compiled, architecture):
    facts = compiled[f"update sm_{architecture}"]
    assert facts["loads"].count(128) == 3
    assert facts["stores"].count(128) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "floor"), [("update", 20), ("update bf16", 18), ("update extras", 30)])
def test_update_moves_the_least_possible_bytes(compiled, name, floor, architecture):
    assert compiled[f"{name} sm_{architecture}"]["bytes"] == floor


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["update", "update bf16", "update extras"])
def test_update_leaves_room_for_all_threads(compiled, name, architecture):
    facts = compiled[f"{name} sm_{architecture}"]
    assert facts["registers"] <= 32
    assert facts["occupancy"] == 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["update", "update bf16", "update extras", "averaging"])
def test_nothing_spills_and_nothing_is_fp64(compiled, name, architecture):
    facts = compiled[f"{name} sm_{architecture}"]
    assert facts["spills"] == 0
    assert facts["stack"] == 0
    # Conversions to and from integers of 64 bits are not arithmetic in fp64; DADD, DMUL, DFMA, DSETP are.
    assert not [i for i in facts["instructions"] if i.startswith(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"))]
    assert not [i for i in facts["instructions"] if i.split(".")[0] in ("F2F", "F2I", "I2F") and ".F64" in i]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_averaging_loads_each_logit_once(compiled, architecture):
    loads = [size for kind, size in compiled[f"averaging sm_{architecture}"]["accesses"] if kind == "load"]
    assert sorted(loads) == [4, 8]  # a logit for each member; a label for each sample
