//! How fast a guest writes its memory.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::QmpError;
use super::super::aside::aside;
use super::super::command::Command;
use super::super::types::Empty;
use super::dirty_limit::soon;
use crate::control::{RunState, VmHandle};
use crate::migrate::{DirtyRate, DirtyRateMode, DirtyRateStatus as Status, Measurement};

/// How long it may be measured, as QEMU has it.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(60);

/// Pages of each GiB that are looked at, unless somebody wants others, and how many he may want.
const SAMPLES: i64 = 512;
const FEWEST_SAMPLES: i64 = 128;
const MOST_SAMPLES: i64 = 4096;

/// QMP `DirtyRateMeasureMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DirtyRateMeasureMode {
    /// By some pages, which are looked at twice.
    #[default]
    PageSampling,
    /// By the vCPUs' dirty rings, where they have any.
    DirtyRing,
    /// By the log of dirty pages.
    DirtyBitmap,
}

/// QMP `DirtyRateStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DirtyRateStatus {
    /// Nothing was measured, or it failed.
    Unstarted,
    /// It is being measured.
    Measuring,
    /// It is known.
    Measured,
}

/// QMP `TimeUnit`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TimeUnit {
    /// Seconds.
    #[default]
    Second,
    /// Milliseconds.
    Millisecond,
}

impl TimeUnit {
    fn read(self, time: i64) -> Option<Duration> {
        let time = u64::try_from(time).ok()?;
        Some(match self {
            Self::Second => Duration::from_secs(time),
            Self::Millisecond => Duration::from_millis(time),
        })
    }

    fn of(self, time: Duration) -> i64 {
        (match self {
            Self::Second => time.as_secs_f64().round() as u64,
            Self::Millisecond => time.as_millis() as u64,
        }) as i64
    }
}

/// QMP `calc-dirty-rate`: begins to measure. Answered when it has begun.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct CalcDirtyRate {
    /// For how long.
    calc_time: i64,
    /// Unless said, seconds.
    #[serde(default)]
    calc_time_unit: Option<TimeUnit>,
    /// Pages of each GiB that are looked at, with page-sampling.
    #[serde(default)]
    sample_pages: Option<i64>,
    /// By what; page-sampling unless said.
    #[serde(default)]
    mode: Option<DirtyRateMeasureMode>,
}

impl CalcDirtyRate {
    fn measurement(&self) -> Result<Measurement, QmpError> {
        let time = self.calc_time_unit.unwrap_or_default().read(self.calc_time);
        let time = time
            .filter(|time| (SHORTEST..=LONGEST).contains(time))
            .ok_or_else(|| QmpError::generic("'calc-time' is out of its range: 50 milliseconds to 60 seconds"))?;
        let mode = match self.mode.unwrap_or_default() {
            DirtyRateMeasureMode::PageSampling => DirtyRateMode::PageSampling,
            DirtyRateMeasureMode::DirtyBitmap => DirtyRateMode::DirtyBitmap,
            DirtyRateMeasureMode::DirtyRing => DirtyRateMode::DirtyRing,
        };
        if self.sample_pages.is_some() && mode != DirtyRateMode::PageSampling {
            return Err(QmpError::generic("'sample-pages' is for mode=page-sampling alone"));
        }
        let samples = self.sample_pages.unwrap_or(SAMPLES);
        if !(FEWEST_SAMPLES..=MOST_SAMPLES).contains(&samples) {
            let why = format!("'sample-pages' is out of its range: {FEWEST_SAMPLES} to {MOST_SAMPLES} of each GiB");
            return Err(QmpError::generic(why));
        }
        Ok(Measurement { mode, time, samples: samples as u64 })
    }
}

impl Command for CalcDirtyRate {
    const NAME: &'static str = "calc-dirty-rate";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let measurement = self.measurement()?;
        if vm.state() == RunState::Inmigrate {
            return Err(QmpError::generic("Guest is waiting for an incoming migration"));
        }
        let migration = vm.migration().clone();
        migration.built().await;
        soon(aside(move || Ok(migration.measure_dirty_rate(measurement)?))).await?;
        Ok(Empty {})
    }
}

/// QMP `query-dirty-rate`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct QueryDirtyRate {
    /// Of `calc-time`; unless said, seconds.
    #[serde(default)]
    calc_time_unit: Option<TimeUnit>,
}

/// QMP `DirtyRateInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DirtyRateInfo {
    /// MiB a second, once it is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    dirty_rate: Option<i64>,
    status: DirtyRateStatus,
    /// When it began: seconds of the system's monotonic clock.
    start_time: i64,
    /// How long it takes, or took.
    calc_time: i64,
    calc_time_unit: TimeUnit,
    /// Of each GiB; 0 but with page-sampling.
    sample_pages: u64,
    mode: DirtyRateMeasureMode,
    /// Of each vCPU, with dirty-ring.
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu_dirty_rate: Option<Vec<DirtyRateVcpu>>,
}

/// QMP `DirtyRateVcpu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DirtyRateVcpu {
    id: i64,
    /// MiB a second.
    dirty_rate: i64,
}

impl DirtyRateInfo {
    fn of(last: &DirtyRate, unit: TimeUnit) -> Self {
        let (status, dirty_rate) = match last.status {
            Status::Unstarted => (DirtyRateStatus::Unstarted, None),
            Status::Measuring => (DirtyRateStatus::Measuring, None),
            Status::Measured(rate) => (DirtyRateStatus::Measured, Some(mebibytes(rate))),
        };
        Self {
            dirty_rate,
            status,
            start_time: last.start.as_secs() as i64,
            calc_time: unit.of(last.time),
            calc_time_unit: unit,
            sample_pages: last.samples,
            mode: match last.mode {
                DirtyRateMode::PageSampling => DirtyRateMeasureMode::PageSampling,
                DirtyRateMode::DirtyBitmap => DirtyRateMeasureMode::DirtyBitmap,
                DirtyRateMode::DirtyRing => DirtyRateMeasureMode::DirtyRing,
            },
            vcpu_dirty_rate: (!last.vcpus.is_empty()).then(|| {
                (0..).zip(&last.vcpus).map(|(id, rate)| DirtyRateVcpu { id, dirty_rate: mebibytes(*rate) }).collect()
            }),
        }
    }
}

fn mebibytes(rate: f64) -> i64 {
    (rate / f64::from(1 << 20)).round() as i64
}

impl Command for QueryDirtyRate {
    const NAME: &'static str = "query-dirty-rate";
    type Reply = DirtyRateInfo;

    async fn run(self, vm: VmHandle) -> Result<DirtyRateInfo, QmpError> {
        Ok(DirtyRateInfo::of(&vm.migration().dirty_rate(), self.calc_time_unit.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &str) -> Result<Measurement, String> {
        serde_json::from_str::<CalcDirtyRate>(arguments).unwrap().measurement().map_err(|e| e.desc)
    }

    #[test]
    fn what_can_t_be_measured_is_refused_by_name() {
        let libvirt = read(r#"{"calc-time": 1}"#).unwrap();
        assert_eq!((libvirt.mode, libvirt.time, libvirt.samples), (DirtyRateMode::PageSampling, LONGEST / 60, 512));
        let short = read(r#"{"calc-time": 50, "calc-time-unit": "millisecond", "mode": "dirty-bitmap"}"#).unwrap();
        assert_eq!((short.mode, short.time), (DirtyRateMode::DirtyBitmap, SHORTEST));
        for (arguments, why) in [
            (r#"{"calc-time": 0}"#, "calc-time"),
            (r#"{"calc-time": -1}"#, "calc-time"),
            (r#"{"calc-time": 61}"#, "calc-time"),
            (r#"{"calc-time": 9223372036854775807}"#, "calc-time"),
            (r#"{"calc-time": 49, "calc-time-unit": "millisecond"}"#, "calc-time"),
            (r#"{"calc-time": 1, "sample-pages": 200, "mode": "dirty-ring"}"#, "sample-pages"),
            (r#"{"calc-time": 1, "sample-pages": 127}"#, "sample-pages"),
            (r#"{"calc-time": 1, "sample-pages": 200, "mode": "dirty-bitmap"}"#, "sample-pages"),
        ] {
            let refused = read(arguments).unwrap_err();
            assert!(refused.contains(why), "{arguments}: {refused}");
        }
    }

    #[test]
    fn a_rate_is_told_once_it_is_known() {
        let none = serde_json::to_value(DirtyRateInfo::of(&DirtyRate::default(), TimeUnit::Second)).unwrap();
        assert_eq!((&none["status"], none.get("dirty-rate")), (&"unstarted".into(), None));
        let status = Status::Measured(2.6 * f64::from(1 << 20));
        let last = DirtyRate { status, time: Duration::from_millis(1004), ..DirtyRate::default() };
        let told = serde_json::to_value(DirtyRateInfo::of(&last, TimeUnit::Second)).unwrap();
        assert_eq!((&told["dirty-rate"], &told["calc-time"]), (&3.into(), &1.into()));
        assert!(told.get("vcpu-dirty-rate").is_none());
        let last = DirtyRate { vcpus: vec![0.0, 2.6 * f64::from(1 << 20)], ..last };
        let told = serde_json::to_value(DirtyRateInfo::of(&last, TimeUnit::Second)).unwrap();
        let vcpus = serde_json::json!([{"id": 0, "dirty-rate": 0}, {"id": 1, "dirty-rate": 3}]);
        assert_eq!(told["vcpu-dirty-rate"], vcpus);
    }
}
