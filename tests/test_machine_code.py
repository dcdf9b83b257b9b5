"""What compile_kernels reads off machine code, on lines written by hand."""

import pytest

from lowmem_grpo.benchmarks.machine_code import by_kernel, longest_loop, waits_in_turn


def sass(*lines: str) -> str:
    return "\n".join(f"        /*{16 * number:04x}*/                   {line} ;" for number, line in enumerate(lines))


def test_loads_that_are_asked_for_together_are_one_wait():
    together = sass(
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "LDG.E R8, desc[UR4][R2.64+0x40]",
        "FADD R9, R7, 1",
        "FADD R9, R9, R8",
        "STG.E desc[UR4][R10.64], R9",
    )
    assert waits_in_turn(together) == 1


def test_a_load_that_follows_the_use_of_another_is_a_wait_of_its_own():
    in_turn = sass(
        "LDG.E R4, desc[UR4][R2.64]",
        "FADD R9, RZ, R4",
        "@!P0 LDG.E R4, desc[UR4][R2.64+0x40]",
        "FADD R9, R9, R4",
    )
    assert waits_in_turn(in_turn) == 2


@pytest.mark.parametrize("use", ["LDG.E R6, desc[UR4][R4.64]", "STG.E.128 desc[UR4][R2.64], R4", "LDG.E R6, [R5]"])
def test_an_address_and_what_is_stored_are_uses(use):
    assert waits_in_turn(sass("LDG.E.64 R4, desc[UR4][R2.64]", use)) == 1


def test_what_is_overwritten_by_a_load_and_what_nobody_uses_are_none():
    assert waits_in_turn(sass("LDG.E R4, desc[UR4][R2.64]", "LDG.E R6, desc[UR4][R2.64]", "FADD R9, RZ, R8")) == 0


def test_a_tensor_core_takes_four_registers_of_a_factor_and_two_of_the_other():
    load = "LDG.E R7, desc[UR4][R2.64]"
    assert waits_in_turn(sass(load, "HMMA.16816.F32.BF16 R20, R4, R12, R20")) == 1
    assert waits_in_turn(sass(load, "HMMA.16816.F32.BF16 R20, R12, R6, R20")) == 1
    assert waits_in_turn(sass(load, "HMMA.16816.F32.BF16 R20, R12.reuse, R5, RZ")) == 0
    assert waits_in_turn(sass(load, "HMMA.16816.F32.BF16 R20, R12, R16, R4")) == 1


def test_a_copy_to_shared_memory_is_waited_for_once():
    copies = sass(
        "LDGSTS.E.BYPASS.128 [R5], desc[UR12][R22.64], P3", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0", "DEPBAR.LE SB0, 0x0"
    )
    assert waits_in_turn(copies) == 1


def test_a_loop_is_as_long_as_its_jump_goes_back():
    assert longest_loop(sass("NOP", "FADD R1, R1, R2", "@P0 BRA 0x10", "@P1 BRA 0x80", "EXIT")) == 2
    assert longest_loop(sass("NOP", "@P0 BRA 0x40", "EXIT")) == 0


def test_an_image_of_several_kernels_is_read_as_each_of_them_alone():
    kernels = ["NOP", "EXIT"], ["FADD R1, R1, R2", "@P0 BRA 0x20", "EXIT"], ["NOP"]
    image = sass(*(line for lines in kernels for line in lines))
    read = by_kernel(f"\t.headerflags @SM90\n{image}\n", [16 * len(lines) for lines in kernels])
    for lines, own in zip(kernels, read, strict=True):
        assert [line.split("*/")[1].strip(" ;") for line in own.splitlines()] == lines
    assert [longest_loop(own) for own in read] == [0, 2, 0]
