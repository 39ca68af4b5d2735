// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every interleaving, in a small world, of the shipped transition code: `Pages`,
//! `HostMap`, `GuestMap` and `Vm` of `crates/core`, of which nothing is written anew.
//! See `README.md` for what is explored and what is not.

pub mod call;
pub mod explore;
pub mod memory;
pub mod scenarios;
pub mod state;
pub mod tlb;
pub mod world;
