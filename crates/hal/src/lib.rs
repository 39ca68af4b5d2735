//! Register and memory access.
#![no_std]
