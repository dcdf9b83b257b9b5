"""Readings of a kernel's PTX and machine code (SASS): widths of accesses, waits for memory, lengths of loops."""

import re
import struct
from itertools import accumulate

# Of PTX: ld.global.v4.b32, st.global.L1::evict_last.b16, ...
ACCESS = re.compile(r"\b(?:ld|st)\.global(?:\.[a-z]\w*::\w+)*(?:\.v(\d))?\.b(\d+)")
# cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;   the third operand is a number of bytes
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)")
# A product and a sum in 16 bits as one operation, rounded once where torch rounds twice.
UNROUNDED = re.compile(r"\bfma\.rn\.(?:bf16|f16)")
WAIT, PREFETCH = "griddepcontrol.wait", "cp.async.bulk.prefetch.L2"
# Whatever reads or writes global memory, and what would lead past a wait.
EARLY = re.compile(r"\b(?:ld|st|atom|red)\.global|\bcp\.async\.c[ag]\b|\bbra\b|\bret\b|\bmbarrier\b")
# Of SASS: /*0610*/  @!P1 LDG.E.128 R16, desc[UR12][R20.64+0x10] ;
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)((?:\.\w+)*) ?(.*?) ?;")
REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
FRAGMENTS = (4, 4, 2, 4)  # registers that a tensor core's 16 x 8 x 16 takes of a thread: result, factors, summand


def narrow_accesses(ttir: str, ptx: str) -> int:
    """Number of instructions that access global memory by less than 16 bytes, beside those of single numbers.

    A single one in a loop over a row makes it several times slower: a bound without a known multiple is enough for
    that.
    """
    widths = [int(vector or 1) * int(bits) for vector, bits in ACCESS.findall(ptx)]
    widths += [8 * int(size, 0) for size in COPY.findall(ptx)]
    single = len(re.findall(r"^(?!.*tensor<).*tt\.(?:load|store) ", ttir, re.MULTILINE))
    return sum(width < 128 for width in widths) - single


def early(ptx: str) -> tuple[int, int]:
    """Numbers of prefetches, and of accesses and jumps, that a kernel does before it waits."""
    before = ptx.partition(WAIT)[0] if WAIT in ptx else ""
    return before.count(PREFETCH), len(EARLY.findall(before))


def code_of(cubin: bytes) -> bytes:
    """The machine code of a cubin's one kernel: the section .text.NAME of an ELF file in 64 bits."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    # Of each section: where its name begins, and its own offset and size.
    sections = [struct.unpack_from("<I20xQQ", cubin, start + size * number) for number in range(count)]
    first = sections[names][1]
    (code,) = (section for section in sections if cubin.startswith(b".text.", first + section[0]))
    return cubin[code[1] : code[1] + code[2]]


def by_kernel(sass: str, sizes: list[int]) -> list[str]:
    """The SASS of each kernel of an image in which they follow one another, from their sizes in bytes."""
    lines: list[list[str]] = [[] for _ in sizes]
    ends, place = list(accumulate(sizes)), 0
    for line in sass.splitlines():
        if instruction := INSTRUCTION.search(line):
            while int(instruction[1], 16) >= ends[place]:
                place += 1
            lines[place].append(line)
    return ["\n".join(of_kernel) for of_kernel in lines]


def waits_in_turn(sass: str) -> int:
    """Number of times that a thread waits for global memory, one after another, from the first line to the last.

    A number that was loaded is waited for where it is first used, and with it all that were asked for before. A body of
    a loop counts once. A wait of 300 cycles, an estimate for numbers in the L2 cache, is 0.2 us at 1.7 GHz.
    """
    waits, copies, pending = 0, False, set()
    for _, name, suffixes, operands in INSTRUCTION.findall(sass):
        copies |= name == "LDGSTS"
        arrived = copies and name == "DEPBAR"
        target, _, sources = operands.partition(",") if name == "LDG" else ("", "", operands)
        width = 4 if ".128" in suffixes else 2 if ".64" in suffixes else 1
        used = set()
        for place, (number, pair) in enumerate(REGISTER.findall(sources)):
            if name in ("HMMA", "IMMA"):
                wide = FRAGMENTS[place]
            else:
                wide = 2 if pair else width if name.startswith(("ST", "RED")) else 1
            used |= set(range(int(number), int(number) + wide))
        if arrived or used & pending:
            waits, copies, pending = waits + 1, False, set()
        if name == "LDG" and (register := REGISTER.search(target)):
            pending |= set(range(int(register[1]), int(register[1]) + width))
    return waits


def longest_loop(sass: str) -> int:
    """Number of instructions of the longest loop's body, 0 without one."""
    longest = 0
    for address, name, _, operands in INSTRUCTION.findall(sass):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and target and int(target[1], 16) < int(address, 16):
            longest = max(longest, (int(address, 16) - int(target[1], 16)) // 16 + 1)
    return longest
