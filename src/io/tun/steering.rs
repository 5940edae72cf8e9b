//! Which TUN queue a packet leaves the host by: a hash of its inner flow,
//! computed by a small eBPF program (`TUNSETSTEERINGEBPF`, Linux 4.16).
//!
//! Left to itself the TUN driver remembers for each flow the queue that its
//! last inbound packet was written to (`tun_flow_update` in
//! `drivers/net/tun.c`) and sends the flow's packets there. With as many queues
//! at both ends that is the queue they took anyway. With unequal numbers it
//! is not: the first answer moves the flow to another queue while packets are
//! under way in the old one, which reorders them. A plain peer, all of whose
//! datagrams arrive at worker 0, would even draw all flows to queue 0. A pure
//! function of the packet does neither, and spares the driver its table.
//!
//! The hash is symmetric, so that with equal numbers of queues both directions
//! of a flow meet at one worker. Fragments go by their addresses alone, since
//! only the first has ports; a flow that mixes fragments with whole packets may
//! use two queues, as with the kernel's own hash.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::Queue;

/// Gives the device the program. It keeps it until it is gone.
///
/// # Errors
/// `EPERM` without CAP_BPF or CAP_SYS_ADMIN, as in a user namespace; others
/// when the kernel has no eBPF.
pub fn install(queue: &Queue) -> io::Result<()> {
    let program = load(&program())?;
    let descriptor: libc::c_int = program.as_raw_fd();
    // SAFETY: the request takes a pointer to a descriptor, which is live for
    // the call; the device takes a reference of its own to the program.
    unsafe { ioctl::set_steering(queue.as_fd().as_raw_fd(), &raw const descriptor) }?;
    Ok(())
}

/// Whether the kernel would take the program from this process.
///
/// # Errors
/// As [`install`].
pub fn probe() -> io::Result<()> {
    load(&program()).map(drop)
}

mod ioctl {
    // TUNSETSTEERINGEBPF, `linux/if_tun.h`: _IOR('T', 224, int), though it
    // only reads the argument.
    nix::ioctl_write_ptr_bad!(
        set_steering,
        nix::request_code_read!(b'T', 224, 4),
        libc::c_int
    );
}

/// `struct bpf_insn` (`linux/bpf.h`).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination register in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}
const _: () = assert!(size_of::<Instruction>() == 8);

/// Registers by number: 0 takes results, 6 the packet for `LD_ABS`.
const R0: u8 = 0;
const R1: u8 = 1;
const R6: u8 = 6;
const R7: u8 = 7;
const R8: u8 = 8;

// Codes of `linux/bpf_common.h` and `linux/bpf.h`, put together.
const MOV64_REGISTER: u8 = 0xbf;
const MOV64_IMMEDIATE: u8 = 0xb7;
const LOAD_ABSOLUTE_BYTE: u8 = 0x30;
const LOAD_ABSOLUTE_HALF: u8 = 0x28;
const LOAD_ABSOLUTE_WORD: u8 = 0x20;
const LOAD_INDIRECT_HALF: u8 = 0x48;
const XOR64_REGISTER: u8 = 0xaf;
const AND64_IMMEDIATE: u8 = 0x57;
const SHIFT_LEFT64_IMMEDIATE: u8 = 0x67;
const SHIFT_RIGHT32_IMMEDIATE: u8 = 0x74;
const MULTIPLY32_IMMEDIATE: u8 = 0x24;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: to | from << 4,
        offset,
        immediate,
    }
}

/// Loads beyond the packet's end finish the program with 0: queue 0.
fn program() -> Vec<Instruction> {
    let load = |code, offset| instruction(code, 0, 0, 0, offset);
    let fold = || instruction(XOR64_REGISTER, R7, R0, 0, 0);
    let mut code = vec![
        instruction(MOV64_REGISTER, R6, R1, 0, 0),
        load(LOAD_ABSOLUTE_BYTE, 0),
        instruction(MOV64_REGISTER, R8, R0, 0, 0),
        instruction(AND64_IMMEDIATE, R0, 0, 0, 0xf0),
    ];
    // R7: the addresses, folded. R8: where the ports are, 0 for no ports.
    let v4 = [
        load(LOAD_ABSOLUTE_WORD, 12),
        instruction(MOV64_REGISTER, R7, R0, 0, 0),
        load(LOAD_ABSOLUTE_WORD, 16),
        fold(),
        instruction(AND64_IMMEDIATE, R8, 0, 0, 0x0f),
        instruction(SHIFT_LEFT64_IMMEDIATE, R8, 0, 0, 2),
        load(LOAD_ABSOLUTE_HALF, 6),
        instruction(AND64_IMMEDIATE, R0, 0, 0, 0x3fff),
        // Over the next one if this is not a fragment.
        instruction(JUMP_EQUAL, R0, 0, 1, 0),
        instruction(MOV64_IMMEDIATE, R8, 0, 0, 0),
        load(LOAD_ABSOLUTE_BYTE, 9),
    ];
    let mut v6 = vec![instruction(MOV64_IMMEDIATE, R7, 0, 0, 0)];
    for offset in (8..40).step_by(4) {
        v6.extend([load(LOAD_ABSOLUTE_WORD, offset), fold()]);
    }
    v6.extend([
        instruction(MOV64_IMMEDIATE, R8, 0, 0, 40),
        load(LOAD_ABSOLUTE_BYTE, 6),
    ]);
    let ports = [
        // R0 is the protocol: only TCP and UDP have ports for us.
        instruction(JUMP_EQUAL, R0, 0, 1, 6),
        instruction(JUMP_NOT_EQUAL, R0, 0, 5, 17),
        instruction(JUMP_EQUAL, R8, 0, 4, 0),
        instruction(LOAD_INDIRECT_HALF, 0, R8, 0, 0),
        fold(),
        instruction(LOAD_INDIRECT_HALF, 0, R8, 0, 2),
        fold(),
    ];
    let finish = [
        instruction(MOV64_REGISTER, R0, R7, 0, 0),
        // Knuth's multiplicative hash; its high bits depend on all of the key.
        instruction(MULTIPLY32_IMMEDIATE, R0, 0, 0, 0x9e37_79b1_u32 as i32),
        instruction(SHIFT_RIGHT32_IMMEDIATE, R0, 0, 0, 16),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    code.push(instruction(JUMP_EQUAL, R0, 0, v6.len() as i16 + 1, 0x40));
    code.extend(v6);
    code.push(instruction(JUMP, 0, 0, v4.len() as i16, 0));
    code.extend(v4);
    code.extend(ports);
    code.extend(finish);
    code
}

/// The part of `union bpf_attr` that `BPF_PROG_LOAD` reads (`linux/bpf.h`).
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_SOCKET_FILTER,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"MIT".as_ptr() as u64,
        log_level: 0,
        log_bytes: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    // SAFETY: the attributes and what they point to are live for the call, and
    // the size is theirs; the kernel copies all of it.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<LoadAttributes>(),
        )
    };
    match libc::c_int::try_from(descriptor) {
        // SAFETY: the call returned a new descriptor that nobody else has.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program on a packet through `BPF_PROG_TEST_RUN`.
    fn run(program: &OwnedFd, packet: &[u8]) -> u32 {
        #[repr(C)]
        struct RunAttributes {
            program: u32,
            result: u32,
            bytes_in: u32,
            bytes_out: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
        }
        // The kernel takes the first 14 bytes for an Ethernet header.
        let mut vnet_packet = vec![0; 14];
        vnet_packet[12..14].copy_from_slice(if packet[0] >> 4 == 4 {
            &[0x08, 0x00]
        } else {
            &[0x86, 0xdd]
        });
        vnet_packet.extend_from_slice(packet);
        let mut attributes = RunAttributes {
            program: program.as_raw_fd() as u32,
            result: 0,
            bytes_in: vnet_packet.len() as u32,
            bytes_out: 0,
            data_in: vnet_packet.as_ptr() as u64,
            data_out: 0,
            repeat: 1,
            duration: 0,
        };
        // SAFETY: the attributes and the vnet packet are live for the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                10,
                &raw mut attributes,
                size_of::<RunAttributes>(),
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        attributes.result
    }

    fn v4(source: [u8; 4], destination: [u8; 4], ports: [u16; 2], fragment: u16) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = 17;
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&destination);
        packet[20..22].copy_from_slice(&ports[0].to_be_bytes());
        packet[22..24].copy_from_slice(&ports[1].to_be_bytes());
        packet
    }

    #[test]
    fn both_directions_of_a_flow_agree_and_flows_spread() {
        // Root of a user namespace may not load programs; nothing to test then.
        let program = match load(&program()) {
            Ok(program) => program,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
                return;
            }
        };
        let (a, b) = ([10, 244, 55, 122], [10, 244, 55, 123]);
        let mut queues = [0; 4];
        for port in 40_000..40_256 {
            let there = run(&program, &v4(a, b, [port, 5201], 0x4000));
            let back = run(&program, &v4(b, a, [5201, port], 0));
            assert_eq!(there, back);
            queues[there as usize % 4] += 1;
        }
        assert!(queues.iter().all(|&flows| flows > 32), "{queues:?}");
        let first = run(&program, &v4(a, b, [40_000, 5201], 0x2000));
        let later = run(&program, &v4(a, b, [1, 2], 0x0010));
        assert_eq!(first, later, "fragments have no ports");

        let mut v6 = vec![0; 60];
        v6[0] = 0x60;
        v6[6] = 6;
        (v6[23], v6[39]) = (1, 2);
        v6[40..44].copy_from_slice(&[0x10, 0x20, 0x30, 0x40]);
        let there = run(&program, &v6);
        (v6[23], v6[39]) = (2, 1);
        v6[40..44].copy_from_slice(&[0x30, 0x40, 0x10, 0x20]);
        assert_eq!(there, run(&program, &v6));
        v6[43] += 1;
        assert_ne!(there, run(&program, &v6));
    }
}
