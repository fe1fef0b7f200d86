//! From samples to what is said about them.

use serde::Serialize;

/// What is said about samples.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) median: f64,
    /// None of fewer than a hundred, of which it would be the largest.
    pub(crate) p99: Option<f64>,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// The samples in ascending order.
pub(crate) fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples
}

/// The value below which this share of the sorted samples lies; NaN without samples.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1) as f64;
    sorted
        .get((last * share).round() as usize)
        .copied()
        .unwrap_or(f64::NAN)
}

pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5)
}

/// The median of the ratios of what was measured one right after the other.
pub(crate) fn median_ratio(of: &[f64], to: &[f64]) -> f64 {
    let ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
    median(&ratios)
}

impl Summary {
    /// The 99th percentile; of few samples, the largest.
    pub(crate) fn nearly_all(&self) -> f64 {
        self.p99.unwrap_or(self.max)
    }
}

pub(crate) fn summary(samples: &[f64]) -> Summary {
    let sorted = sorted(samples);
    Summary {
        n: sorted.len(),
        median: quantile(&sorted, 0.5),
        p99: (sorted.len() >= 100).then(|| quantile(&sorted, 0.99)),
        min: quantile(&sorted, 0.0),
        max: quantile(&sorted, 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_there_is_to_say() {
        let samples: Vec<f64> = (1..=101).rev().map(f64::from).collect();
        let said = summary(&samples);
        assert_eq!((said.n, said.median, said.p99), (101, 51.0, Some(100.0)));
        assert_eq!((said.min, said.max), (1.0, 101.0));
        assert_eq!(summary(&samples[..99]).p99, None);
        assert_eq!(median(&[3.0]), 3.0);
        assert!(median(&[]).is_nan());
    }
}
