// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rows of `cargo xtask test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::job::{self, Limits};
use crate::machine::{Config, EDU, Event, Kind, Machine};
use crate::run::{self, Cpu};
use crate::setup::{self, Need, TARGETS};
use crate::test::{Ended, Gave, Test, Verdict, secs};
use crate::{
    Ctx, assurance, attack, bench, build, coverage, deny, failure, fuzz, fuzz_host, fuzz_target,
    image, kernel, miri, model, operate, sh, tcb,
};

/// One row.
pub struct Row {
    /// Its name: group, machine, what.
    pub name: String,
    /// The longest that it may take.
    pub limit: Duration,
    /// The command that repeats it.
    pub command: String,
    /// What it does.
    pub work: Work,
}

/// Kinds of work.
#[derive(Debug, Clone)]
pub enum Work {
    /// Cargo with these words.
    Cargo(Vec<&'static str>),
    /// The bare-metal payload on the real monitor.
    Payload(u32, Cpu),
    /// A slice of `cargo xtask fuzz --target`: so many calls.
    Fuzz(u32, Cpu, u64),
    /// The comparison of `cargo xtask run`.
    Run(u32, Cpu),
    /// A job of the host's agent under the monitor, with more words for its command line.
    Job(&'static str, u32, Cpu, &'static str),
    /// A kernel and firmware that don't match: the monitor is wanted and not there, or (on its own
    /// machine) there and not wanted. With `/dev/kvm` expected or not.
    Mismatch(Kind, bool),
    /// Test monitors can leave checks out, no other can.
    LeaveOut,
    /// All threats, each on its control and under HA-VMSI.
    Attack,
    /// docs/threats.md is what the rows of the attacks make of it.
    ThreatsDoc,
    /// Counts that have risen over the committed figures.
    Bench,
    /// docs/benchmarks is what the committed figures make of it.
    BenchDoc,
    /// docs/assurance.md and docs/tcb.md are what docs/assurance.json makes of them.
    AssuranceDoc,
    /// The pure crate against its model, for so many seconds.
    FuzzHost(u64),
    /// Every interleaving in small worlds.
    Model,
    /// A reset leaves nothing of a VM.
    Reset,
    /// The monitor's panic stops all CPUs.
    Panic,
    /// Lines of the pure crate that its unit tests execute.
    Coverage,
    /// Unit tests of the pure crate in Miri.
    Miri,
    /// Licences and origins of all packages.
    Deny,
    /// Size of the TCB.
    Tcb,
    /// Size of the kernel series.
    Series,
    /// xtask itself, called wrongly or in a broken environment.
    Cli(&'static str),
}

/// Lines at EL3 that are ours, at most.
const TCB_LIMIT: usize = 5000;
/// Lines that the series touches in the kernel's own files, at most.
const SERIES_LIMIT: usize = 250;

/// Calls of the slice of fuzzing in the table.
const FUZZ_CALLS: u64 = 200_000;

/// All rows, cheap ones first.
pub fn table() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut add = |name: String, limit: u64, work: Work| {
        let command = match &work {
            Work::Cargo(words) => format!("cargo {}", words.join(" ")),
            Work::Run(gic, cpu) => format!("cargo xtask run --gic {gic} --cpu {}", cpu.name()),
            Work::Job(job, gic, cpu, more) => {
                format!(
                    "cargo xtask run --no-control --gic {gic} --cpu {} --job {job} --append '{more}'",
                    cpu.name()
                )
            }
            Work::Fuzz(gic, cpu, calls) => {
                format!(
                    "cargo xtask fuzz --target --calls {calls} --gic {gic} --cpu {}",
                    cpu.name()
                )
            }
            Work::FuzzHost(_) => "cargo xtask fuzz --host".to_owned(),
            Work::Model => "cargo xtask model".to_owned(),
            Work::Attack => "cargo xtask attack".to_owned(),
            Work::Bench => "cargo xtask bench --quick".to_owned(),
            Work::Coverage => "cargo xtask coverage".to_owned(),
            Work::Miri => "cargo xtask miri".to_owned(),
            Work::Deny => "cargo xtask deny".to_owned(),
            Work::Tcb => "cargo xtask tcb".to_owned(),
            Work::Series => "cargo xtask kernel --stat".to_owned(),
            _ => format!("cargo xtask test --only {name}"),
        };
        rows.push(Row { name, limit: secs(limit), command, work });
    };
    let (a57, n1) = (Cpu::CortexA57, Cpu::NeoverseN1);
    add("style/fmt".into(), 60, Work::Cargo(vec!["fmt", "--all", "--check"]));
    add(
        "style/clippy-build-machine".into(),
        300,
        Work::Cargo(vec!["clippy", "--all-targets", "--", "-D", "warnings"]),
    );
    let plugin = vec!["clippy", "--release", "-p", "havmsi-plugin"];
    add("style/clippy-plugin".into(), 300, Work::Cargo(plugin));
    for (name, target, packages) in [
        (
            "style/clippy-el3",
            TARGETS[0],
            &["havmsi-monitor", "havmsi-hal", "havmsi-core", "havmsi-abi"][..],
        ),
        ("style/clippy-payload", TARGETS[0], &["havmsi-payload", "havmsi-bench-guest"]),
        (
            "style/clippy-arm64",
            TARGETS[1],
            &["havmsi", "havmsi-agent", "havmsi-guest", "havmsi-run", "havmsi-vmm"],
        ),
    ] {
        let mut words = vec!["clippy", "--release", "--target", target];
        packages.iter().for_each(|p| words.extend(["-p", p]));
        add(name.into(), 300, Work::Cargo(words));
    }
    add("style/deny".into(), 60, Work::Deny);
    // Juno's board: nobody has one here, so all that can be said is that it builds.
    let mut juno = vec!["build", "--release", "-p", "havmsi-monitor", "--target", TARGETS[0]];
    juno.extend([
        "--no-default-features",
        "--features",
        "board-juno",
        "--target-dir",
        "target/juno",
    ]);
    add("build/juno".into(), 300, Work::Cargo(juno));
    add("build/leave-out".into(), 300, Work::LeaveOut);
    for package in [
        "havmsi",
        "havmsi-abi",
        "havmsi-core",
        "havmsi-operations",
        "havmsi-proto",
        "havmsi-run",
        "xtask",
    ] {
        let words = vec!["test", "-q", "--all-features", "-p", package];
        add(format!("unit/{package}"), 600, Work::Cargo(words));
    }
    add("unit/coverage".into(), 300, Work::Coverage);
    add("unit/miri".into(), 600, Work::Miri);
    // The pure crate with loom's atomics, and with shuttle's: docs/architecture.md, "Locks".
    for (tool, test) in [("loom", "orders"), ("shuttle", "schedules")] {
        let mut words = vec!["test", "-q", "--locked", "--manifest-path", "schedules/Cargo.toml"];
        words.extend(["--target-dir", "target/schedules", "--features", tool, "--test", test]);
        add(format!("schedules/{tool}"), 600, Work::Cargo(words));
    }
    let mut broken = vec!["test", "-q", "--profile", "model", "-p", "havmsi-models"];
    broken.extend(["--features", "leave-out"]);
    add("model/broken".into(), 300, Work::Cargo(broken));
    add("model/shipped".into(), 1200, Work::Model);
    add("fuzz/host".into(), 300, Work::FuzzHost(40));
    add("size/tcb".into(), 120, Work::Tcb);
    add("size/series".into(), 30, Work::Series);
    add("docs/threats".into(), 30, Work::ThreatsDoc);
    add("docs/benchmarks".into(), 30, Work::BenchDoc);
    add("docs/assurance".into(), 120, Work::AssuranceDoc);
    for what in [
        "wrong-option",
        "wrong-value",
        "unknown-qemu",
        "old-qemu",
        "no-qemu",
        "small-disk",
        "dead-qemu",
    ] {
        add(format!("cli/{what}"), 60, Work::Cli(what));
    }
    for cpu in [a57, n1] {
        for gic in [3, 2] {
            add(format!("payload/gic{gic}/{}", cpu.name()), 180, Work::Payload(gic, cpu));
        }
    }
    for (gic, cpu) in [(3, a57), (2, n1)] {
        add(format!("fuzz/gic{gic}/{}", cpu.name()), 180, Work::Fuzz(gic, cpu, FUZZ_CALLS));
    }
    add("bench/quick".into(), 600, Work::Bench);
    add("failure/reset".into(), 120, Work::Reset);
    add("failure/panic".into(), 60, Work::Panic);
    add("linux/no-monitor/el2".into(), 90, Work::Mismatch(Kind::Control, true));
    add("linux/no-monitor/el1".into(), 90, Work::Mismatch(Kind::Bare, false));
    add("linux/monitor-not-wanted".into(), 90, Work::Mismatch(Kind::Havmsi, false));
    for (gic, cpu) in [(3, a57), (2, a57), (3, n1), (2, n1)] {
        add(format!("linux/run/gic{gic}/{}", cpu.name()), 420, Work::Run(gic, cpu));
    }
    for (job, more) in [
        ("smp4", "havmsi.vcpus=4"),
        ("reboot", "havmsi.vcpus=2"),
        ("hotplug", "havmsi.guests=2"),
        ("io", "havmsi.guests=2"),
        ("devices", "havmsi.guests=2"),
        ("operate", "havmsi.vcpus=2"),
    ] {
        for (gic, cpu) in [(3, a57), (2, n1)] {
            add(
                format!("linux/{job}/gic{gic}/{}", cpu.name()),
                240,
                Work::Job(job, gic, cpu, more),
            );
        }
    }
    add("attack".into(), 600, Work::Attack);
    add(
        "linux/rounds/gic3/cortex-a57".into(),
        600,
        Work::Job("rounds", 3, a57, "havmsi.rounds=20 havmsi.guests=1 havmsi.timeout=560"),
    );
    add(
        "linux/memlock/gic3/cortex-a57".into(),
        240,
        Work::Job("memlock", 3, a57, "havmsi.guests=1"),
    );
    add("linux/boot/gic3/max".into(), 240, Work::Job("boot", 3, Cpu::Max, "havmsi.guests=2"));
    rows
}

/// Builds what the chosen rows need, so that no row's time-out pays for it.
pub fn prepare(ctx: &Ctx, rows: &[&Row]) -> Result<()> {
    let any = |kind: fn(&Work) -> bool| rows.iter().any(|r| kind(&r.work));
    let cargo = any(|w| matches!(w, Work::Cargo(_)));
    if any(|w| matches!(w, Work::Fuzz(..))) {
        fuzz_target::prepare(ctx)?;
    }
    if any(|w| matches!(w, Work::Bench)) {
        build::plugin(ctx)?;
        build::bench_guest(ctx)?;
    }
    let payload = any(|w| matches!(w, Work::Payload(..) | Work::Reset | Work::Panic));
    let linux = any(|w| {
        matches!(
            w,
            Work::Run(..)
                | Work::Attack
                | Work::Bench
                | Work::Job(..)
                | Work::Mismatch(..)
                | Work::Cli(_)
        )
    });
    // All at once, so that whoever has to install by hand is told once.
    let mut needs = Vec::new();
    if cargo {
        needs.extend([Need::Targets, Need::Lints]);
    }
    if payload {
        needs.extend([Need::Qemu, Need::Targets, Need::Binutils]);
    }
    if linux {
        needs.extend(setup::ALL);
    }
    setup::ensure(ctx, &needs)?;
    if any(|w| matches!(w, Work::Coverage)) {
        coverage::build(ctx)?;
    }
    if any(|w| matches!(w, Work::Miri)) {
        miri::prepare(ctx)?;
    }
    if any(|w| matches!(w, Work::Deny)) {
        deny::prepare(ctx)?;
    }
    if any(|w| matches!(w, Work::Model)) {
        model::build(ctx)?;
    }
    if payload {
        build::payload(ctx)?;
    }
    if linux {
        image::all(ctx)?;
    }
    if payload || linux {
        build::monitor(ctx)?;
    }
    Ok(())
}

/// Does a row's work.
pub fn work(ctx: &Ctx, row: &Row) -> Result<Ended> {
    fs::create_dir_all(&ctx.log_dir)?;
    match &row.work {
        Work::Cargo(words) => {
            let mut command =
                Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.current_dir(&ctx.root).args(words);
            let log = ctx.log("cargo.log");
            sh::run_limited(&mut command, &log, row.limit)?;
            Ok(Ended::ok(test_count(&fs::read_to_string(&log)?)))
        }
        Work::Fuzz(gic, cpu, calls) => {
            let args = fuzz::Args { calls: *calls, gic: *gic, cpu: *cpu, ..fuzz::Args::default() };
            Ok(Ended::ok(fuzz_target::row(ctx, &args, row.limit)?))
        }
        Work::FuzzHost(seconds) => {
            let report = fuzz_host::fuzz(ctx, secs(*seconds))?;
            Ok(Ended::ok(fuzz_host::verdict(&report)?))
        }
        Work::Model => Ok(Ended::ok(model::verdict(&model::row(ctx, row.limit)?)?)),
        Work::Payload(gic, cpu) => payload(ctx, *gic, *cpu, row.limit),
        Work::Run(gic, cpu) => {
            let report =
                run::execute(ctx, &run::Args { gic: *gic, cpu: *cpu, ..run::Args::default() })?;
            if !report.problems.is_empty() {
                bail!("{}", report.problems.join("\n"));
            }
            Ok(Ended::ok(format!(
                "{} checks exposed on plain KVM and protected here",
                report.checks.len()
            )))
        }
        Work::Job(job, gic, cpu, more) => {
            let args = run::Args {
                gic: *gic,
                cpu: *cpu,
                no_control: true,
                job: (*job).to_owned(),
                append: (*more).to_owned(),
                ..run::Args::default()
            };
            let config = run::configure(ctx, &args, Kind::Havmsi)?;
            let outcome = job::run(&config, &ctx.log_dir, limits(row.limit), |_| ())?;
            if outcome.start("monitor").and_then(Value::as_bool) != Some(true) {
                bail!(
                    "the host says that it runs without the monitor; see {}",
                    ctx.log_dir.display()
                );
            }
            match &outcome.done {
                Some((true, _)) if *job == "operate" => {
                    Ok(Ended::ok(operate::digests(ctx, &outcome, &args)?))
                }
                Some((true, text)) => Ok(Ended::ok(text.clone())),
                Some((false, text)) => bail!("{text}"),
                None => bail!("the job did not end"),
            }
        }
        Work::Mismatch(kind, kvm) => mismatch(ctx, *kind, *kvm, row.limit),
        Work::LeaveOut => {
            build::no_release_leaves_out(ctx)?;
            build::test_monitor(ctx)?;
            build::monitor(ctx)?;
            Ok(Ended::ok("no release compiles with it, and the image has nothing of it"))
        }
        Work::Attack => {
            let report = attack::execute(ctx, &[])?;
            if !report.problems.is_empty() {
                bail!("{}", report.problems.join("\n"));
            }
            Ok(Ended::ok(report.summary()))
        }
        Work::Reset => Ok(Ended::ok(failure::reset(ctx, row.limit)?)),
        Work::Panic => Ok(Ended::ok(failure::panic(ctx, row.limit)?)),
        Work::Bench => Ok(Ended::ok(bench::quick::row(ctx)?)),
        Work::BenchDoc => Ok(Ended::ok(bench::docs::matching(ctx)?)),
        Work::AssuranceDoc => Ok(Ended::ok(assurance::matching(ctx)?)),
        Work::ThreatsDoc => Ok(Ended::ok(attack::docs_match(ctx)?)),
        Work::Coverage => Ok(Ended::ok(coverage::measure(ctx)?.verdict()?)),
        Work::Miri => Ok(Ended::ok(miri::execute(ctx, &[], Some(row.limit))?.line())),
        Work::Deny => Ok(Ended::ok(deny::check(ctx, &deny::Args::default())?)),
        Work::Tcb => {
            let summary = tcb::count(ctx)?;
            let lines = summary.own_lines;
            if lines >= TCB_LIMIT {
                bail!("{lines} lines of our own at EL3; the limit is {TCB_LIMIT}");
            }
            summary.stack.verdict()?;
            let stack = &summary.stack;
            Ok(Ended::ok(format!(
                "{lines} lines of our own at EL3; at most {} of {} bytes of stack",
                stack.bound, stack.size
            )))
        }
        Work::Series => {
            let stat = kernel::stat(ctx)?;
            let touched = stat.added + stat.removed;
            if touched == 0 || touched >= SERIES_LIMIT {
                bail!(
                    "the series touches {touched} lines of existing files; it should be 1 to {SERIES_LIMIT}"
                );
            }
            Ok(Ended::ok(format!("{touched} touched lines, {} new ones", stat.new_lines)))
        }
        Work::Cli(what) => crate::cli_rows::work(ctx, what, row.limit),
    }
}

fn limits(total: Duration) -> Limits {
    Limits { total, silence: secs(120).min(total) }
}

/// Sums up what `cargo test` printed.
fn test_count(log: &str) -> String {
    let passed: u64 = log
        .lines()
        .filter_map(|l| l.strip_prefix("test result: ok. ")?.split(' ').next()?.parse::<u64>().ok())
        .sum();
    if passed == 0 { String::new() } else { format!("{passed} unit tests") }
}

/// The payload's machine.
pub fn payload_config(image: PathBuf, monitor: &build::Monitor, gic: u32, cpu: Cpu) -> Config {
    Config {
        kind: Kind::Havmsi,
        cpus: 4,
        mem_mib: 1024,
        gic,
        cpu: cpu.name().to_owned(),
        kernel: image,
        root: None,
        append: String::new(),
        monitor: Some(monitor.image.clone()),
        behind: vec![],
        secret: None,
        // A second DMA engine, on a bus that has no streams.
        extra: ["-device", "pcie-root-port,id=far", "-device", &format!("{EDU},bus=far")]
            .map(str::to_owned)
            .to_vec(),
    }
}

fn payload(ctx: &Ctx, gic: u32, cpu: Cpu, limit: Duration) -> Result<Ended> {
    let Some(image) = build::payload(ctx)? else {
        return Ok(Ended::Skip("there is no payload/ in this tree".to_owned()));
    };
    let config = payload_config(image, &build::monitor(ctx)?, gic, cpu);
    let mut machine = Machine::start(&config, &ctx.log_dir)?;
    let mut gave = Gave::default();
    let mut done = None;
    let start = std::time::Instant::now();
    let mut last = "the payload's first test".to_owned();
    loop {
        if start.elapsed() > limit {
            return Err(machine.report(&format!(
                "time-out: {} s are over, waiting for what comes after {last}",
                limit.as_secs()
            )));
        }
        match machine.next(secs(1))? {
            Event::Silence => {
                if let Some(line) = crate::machine::epitaph(&machine.monitor_log()) {
                    return Err(
                        machine.report(&format!("the monitor stopped after {last}: {line}"))
                    );
                }
            }
            Event::End(_) => break,
            Event::Line(line) => payload_line(&line, &mut gave, &mut done, &mut last)?,
        }
    }
    let Some((passed, failed)) = done else {
        return Err(
            machine.report(&format!("the machine ended after {last}, before the payload was done"))
        );
    };
    if gave.tests.is_empty() {
        bail!("the payload ran no test");
    }
    let failures =
        gave.tests.iter().filter(|t| matches!(t.verdict, Verdict::Failed(_))).count() as u64;
    if passed + failed != gave.tests.len() as u64 || failed != failures {
        bail!(
            "lines were lost: the payload counts {passed} + {failed}, {} arrived",
            gave.tests.len()
        );
    }
    Ok(Ended::Gave(gave))
}

fn payload_line(
    line: &str,
    gave: &mut Gave,
    done: &mut Option<(u64, u64)>,
    last: &mut String,
) -> Result<()> {
    let Some((word, json)) = line.strip_prefix('@').and_then(|l| l.split_once(' ')) else {
        return Ok(());
    };
    let event: Value =
        serde_json::from_str(json).with_context(|| format!("a broken line: {line}"))?;
    let text = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
    match word {
        "test" => {
            *last = text("name");
            let verdict = if event["result"] == "ok" {
                Verdict::Passed
            } else {
                Verdict::Failed(text("detail"))
            };
            gave.tests.push(Test { name: text("name"), verdict });
        }
        "skip" => gave.not_here.push(text("name")),
        "panic" => gave
            .tests
            .push(Test { name: format!("after {last}"), verdict: Verdict::Failed(text("detail")) }),
        "done" => {
            *done =
                Some((event["passed"].as_u64().unwrap_or(0), event["failed"].as_u64().unwrap_or(0)))
        }
        _ => {}
    }
    Ok(())
}

/// Kernel and firmware don't match: the kernel must say so and live.
fn mismatch(ctx: &Ctx, kind: Kind, kvm: bool, limit: Duration) -> Result<Ended> {
    let args = run::Args {
        job: "nokvm".to_owned(),
        control: kind != Kind::Havmsi,
        ..run::Args::default()
    };
    let mut config = run::configure(ctx, &args, kind)?;
    let (from, to) = if kind == Kind::Havmsi { ("havmsi", "nvhe") } else { ("nvhe", "havmsi") };
    let mode = |word| format!("kvm-arm.mode={word}");
    config.append = config.append.replace(&mode(from), &mode(to));
    let outcome = job::run(&config, &ctx.log_dir, limits(limit), |_| ())?;
    let found = outcome.start("kvm").and_then(Value::as_bool);
    if found != Some(kvm) {
        bail!("/dev/kvm: {found:?}, expected {kvm}; see {}", ctx.log_dir.display());
    }
    let console = fs::read_to_string(ctx.log("console.log"))?;
    let said = console
        .lines()
        .find(|l| l.contains("HA-VMSI") || l.contains("havmsi:"))
        .with_context(|| format!("the kernel says nothing; see {}", ctx.log_dir.display()))?;
    match outcome.done {
        Some((true, _)) => Ok(Ended::ok(said.trim().to_owned())),
        _ => bail!("the host did not come through; see {}", ctx.log_dir.display()),
    }
}

/// True if a folder has no entry of a kind.
pub fn no_entries(dir: &Path) -> bool {
    fs::read_dir(dir).map_or(true, |mut d| d.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payload_lines_are_counted() {
        let (mut gave, mut done, mut last) = (Gave::default(), None, String::new());
        for line in [
            r#"@test {"name":"abi::version","result":"ok","detail":""}"#,
            r#"@test {"name":"abi::x","result":"fail","detail":"line 3: no"}"#,
            r#"@skip {"name":"gic::v2"}"#,
            r#"@done {"passed":1,"failed":1}"#,
            "noise",
        ] {
            payload_line(line, &mut gave, &mut done, &mut last).unwrap();
        }
        assert_eq!((gave.tests.len(), gave.not_here.len(), done), (2, 1, Some((1, 1))));
        assert!(payload_line("@test {", &mut gave, &mut done, &mut last).is_err());
    }

    #[test]
    fn unit_tests_are_summed() {
        assert_eq!(
            test_count("test result: ok. 3 passed; 0 failed\ntest result: ok. 4 passed;\n"),
            "7 unit tests"
        );
    }
}
