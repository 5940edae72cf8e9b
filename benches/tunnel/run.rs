//! The run: targets in turn, round after round, so that whatever else
//! changes on the machine meanwhile changes for all of them.

use std::sync::atomic::Ordering;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use testbed::Pair;

use crate::measure::{Method, Sample, Stage, is_damage};
use crate::progress::Progress;
use crate::quiet::{self, OTHERS_PERCENT_MAX, Others};
use crate::results::{self, Cell};
use crate::syscalls;
use crate::targets::{Link, Target, UNDERLAY, UNDERLAY_MTU_BYTES, UNDERLAY_PREFIX};
use crate::traffic::{Kind, Traffic};
use crate::underlay::Underlay;

/// How often a sample that others disturbed is taken again.
const REPETITIONS_MAX: usize = 2;

/// What is to be measured.
pub struct Plan {
    /// What is compared, in this order.
    pub targets: Vec<Box<dyn Target>>,
    /// The traffic, in this order.
    pub traffic: Vec<Traffic>,
    /// The cable.
    pub underlay: Underlay,
    /// How often.
    pub rounds: usize,
    /// How samples are taken.
    pub method: Method,
}

/// What was measured.
#[derive(Default)]
pub struct Outcome {
    /// The targets, with the reasons why some were left out.
    pub targets: Vec<results::Target>,
    /// All samples.
    pub cells: Vec<Cell>,
    /// Samples that others disturbed to the last, each with how much.
    pub disturbed: Vec<String>,
    /// How many samples were taken again because others disturbed them.
    pub repeated: usize,
    /// Links and samples that failed, each with the reason.
    pub failed: Vec<String>,
    /// Why system calls were not counted, if they were to be.
    pub no_system_calls: Option<String>,
    /// Why the run ended early, if it did.
    pub ended: Option<Error>,
}

/// Measures all there is to measure. Ends early when a signal wants it to or
/// bytes were damaged; what was measured until then is in the outcome.
pub fn run(plan: &Plan) -> Outcome {
    let timed: Vec<&Traffic> = plan
        .traffic
        .iter()
        .filter(|traffic| traffic.kind != Kind::SystemCalls)
        .collect();
    let counted = plan
        .traffic
        .iter()
        .find(|traffic| traffic.kind == Kind::SystemCalls);
    let mut outcome = Outcome::default();
    let mut active = Vec::new();
    for target in &plan.targets {
        let missing = target.missing();
        if missing.is_none() {
            active.push(target.as_ref());
        }
        outcome.targets.push(results::Target {
            key: target.key().into(),
            title: target.title().into(),
            detail: target.detail(),
            missing,
        });
    }
    let mut counted = counted;
    if counted.is_some() {
        outcome.no_system_calls = syscalls::missing();
        if outcome.no_system_calls.is_some() {
            counted = None;
        }
    }
    let steps_per_link = timed.iter().filter(|traffic| traffic.is_timed()).count();
    let steps = active.len() * (plan.rounds * steps_per_link + 2 * usize::from(counted.is_some()));
    let mut run = Run {
        plan,
        outcome,
        progress: Progress::new(steps),
    };
    let ended = run.rounds(&active, &timed).and_then(|()| match counted {
        Some(traffic) => run.count_system_calls(&active, traffic),
        None => Ok(()),
    });
    run.progress.clear();
    run.outcome.ended = ended.err();
    run.outcome
}

struct Run<'a> {
    plan: &'a Plan,
    outcome: Outcome,
    progress: Progress,
}

impl Run<'_> {
    fn rounds(&mut self, active: &[&dyn Target], timed: &[&Traffic]) -> Result<()> {
        if timed.is_empty() {
            return Ok(());
        }
        let rounds = self.plan.rounds;
        for round in 1..=rounds {
            for target in active {
                let name = format!("round {round} of {rounds}, {}", target.key());
                self.progress.begin(&name);
                let before = self.progress.done();
                if let Some((pair, link)) = self.start(*target, &name)? {
                    for traffic in timed {
                        self.measure(&pair, &link, *target, traffic, &name)?;
                    }
                }
                // A link that did not come up takes its samples with it.
                let steps = timed.iter().filter(|traffic| traffic.is_timed()).count();
                self.progress.advance_to(before + steps);
            }
        }
        Ok(())
    }

    fn count_system_calls(&mut self, active: &[&dyn Target], traffic: &Traffic) -> Result<()> {
        for target in active {
            let name = format!("counting system calls, {}", target.key());
            self.progress.begin(&name);
            let before = self.progress.done();
            if let Some((pair, link)) = self.start(*target, &name)? {
                let stage = Stage {
                    pair: &pair,
                    link: &link,
                    port: target.port(),
                    method: &self.plan.method,
                };
                match syscalls::sample(&stage) {
                    Ok(sample) => self.record(traffic, *target, sample),
                    Err(error) => self.failure(&name, error)?,
                }
            }
            self.progress.advance_to(before + 2);
        }
        Ok(())
    }

    /// A fresh pair of hosts for every link: nothing that one has left behind,
    /// such as TCP's memory of a path, meets the next.
    fn start(&mut self, target: &dyn Target, name: &str) -> Result<Option<(Pair, Link)>> {
        self.check_signal()?;
        let net = |host: usize| IpNet::new_assert(UNDERLAY[host].into(), UNDERLAY_PREFIX);
        let pair = testbed::pair(&[(net(0), net(1))], UNDERLAY_MTU_BYTES)?;
        self.plan.underlay.apply(&pair)?;
        match target.start(&pair) {
            Ok(link) => Ok(Some((pair, link))),
            Err(error) => {
                self.failure(name, error)?;
                Ok(None)
            }
        }
    }

    fn measure(
        &mut self,
        pair: &Pair,
        link: &Link,
        target: &dyn Target,
        traffic: &Traffic,
        name: &str,
    ) -> Result<()> {
        let name = format!("{name}, {}", traffic.key);
        self.progress.detail(&name);
        let method = &self.plan.method;
        let stage = Stage {
            pair,
            link,
            port: target.port(),
            method,
        };
        let mut best: Option<(f64, Sample)> = None;
        for repetition in 0..=REPETITIONS_MAX {
            self.check_signal()?;
            if traffic.is_timed() {
                quiet::wait(&method.stop)?;
            }
            let others = Others::now()?;
            let sample = match stage.sample(traffic.kind) {
                Ok(sample) => sample,
                Err(error) => return self.failure(&name, error),
            };
            let percent = if traffic.is_timed() {
                others.percent_since()?
            } else {
                0.0
            };
            self.outcome.repeated += usize::from(repetition > 0);
            if best.as_ref().is_none_or(|(least, _)| percent < *least) {
                best = Some((percent, sample));
            }
            if percent <= OTHERS_PERCENT_MAX {
                break;
            }
        }
        if let Some((percent, sample)) = best {
            if percent > OTHERS_PERCENT_MAX {
                self.outcome
                    .disturbed
                    .push(format!("{name}: others used {percent:.0} % of a core"));
            }
            self.record(traffic, target, sample);
        }
        self.progress.advance(usize::from(traffic.is_timed()));
        Ok(())
    }

    fn record(&mut self, traffic: &Traffic, target: &dyn Target, sample: Sample) {
        for (figure, value) in sample {
            let row = traffic.row_key(figure);
            let cells = &mut self.outcome.cells;
            let found = cells
                .iter_mut()
                .find(|cell| cell.row == row && cell.target == target.key());
            match found {
                Some(cell) => cell.samples.push(value),
                None => cells.push(Cell {
                    row,
                    target: target.key().into(),
                    samples: vec![value],
                }),
            }
        }
    }

    /// Notes a failure and goes on; damage and signals end the run.
    fn failure(&mut self, name: &str, error: Error) -> Result<()> {
        self.check_signal()?;
        if is_damage(&error) {
            return Err(Error::new(format!("{name}: DAMAGED: {error}")));
        }
        let line = format!("{name}: {error}");
        self.progress.say(&format!("failed: {line}"));
        self.outcome.failed.push(line);
        Ok(())
    }

    fn check_signal(&self) -> Result<()> {
        if self.plan.method.stop.load(Ordering::Relaxed) {
            return Err(Error::new("interrupted"));
        }
        Ok(())
    }
}
