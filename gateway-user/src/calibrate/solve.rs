//! Non-negative least squares for a handful of unknowns, exactly.
//!
//! The best non-negative solution is the ordinary one on those unknowns that are not 0 in it. There are at most 15 sets of four unknowns, so all
//! of them are tried, and the best whose ordinary solution has nothing negative is the answer. That takes no iteration that could stall, and no
//! tolerance that could be wrong; libraries for the general case bring matrices of any size along. A set whose columns nearly depend on each other
//! is passed over: a smaller set fits as well.

/// How many unknowns there can be.
pub(super) const UNKNOWNS: usize = 4;

/// A pivot of the scaled normal equations below which a column is a combination of the others: half of a float's digits are gone by then.
const PIVOT_MIN: f64 = 1e-8;

/// A row of the equations, and what it should come to.
pub(super) type Row = ([f64; UNKNOWNS], f64);

/// What solves the equations best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Solution {
    /// The unknowns; 0 where a column has nothing but 0, or where a negative value would have been better.
    pub(super) values: [f64; UNKNOWNS],
    /// Standard errors; 0 where the value is.
    pub(super) errors: [f64; UNKNOWNS],
    /// By how much each one's variance is larger for its column's likeness to the others (those that are 0 in the solution included, since they can
    /// be 0 for that likeness alone): 1 where there is none, and without bound where a column is a combination of the others.
    pub(super) inflations: [f64; UNKNOWNS],
}

/// Solves by least squares, no unknown below 0. Without rows, and without columns, all is 0.
pub(super) fn solve(rows: &[Row]) -> Solution {
    let normal = Normal::of(rows);
    let mut best = Solution {
        values: [0.0; UNKNOWNS],
        errors: [0.0; UNKNOWNS],
        inflations: normal.inflations(),
    };
    let mut variances = [0.0; UNKNOWNS];
    let (mut best_gain, mut best_set) = (0.0, 0);
    for set in 1..1_usize << UNKNOWNS {
        let Some(inverse) = normal.inverse(set) else {
            continue;
        };
        let scaled = normal.solution(&inverse);
        let gain: f64 = scaled
            .iter()
            .zip(normal.moments)
            .map(|(value, moment)| value * moment)
            .sum();
        if scaled.iter().all(|value| *value >= 0.0) && gain > best_gain {
            (best_gain, best_set) = (gain, set);
            for at in (0..UNKNOWNS).filter(|at| normal.lengths[*at] > 0.0) {
                best.values[at] = scaled[at] / normal.lengths[at];
                variances[at] = inverse[at][at] / normal.lengths[at].powi(2);
            }
        }
    }
    let residuals = rows
        .iter()
        .map(|(row, right)| (right - product(row, &best.values)).powi(2));
    let freedom = rows.len().saturating_sub(best_set.count_ones() as usize);
    let variance = residuals.sum::<f64>() / freedom.max(1) as f64;
    best.errors = variances.map(|of_one| (variance * of_one).sqrt());
    best
}

/// What a row comes to.
pub(super) fn product(row: &[f64; UNKNOWNS], values: &[f64; UNKNOWNS]) -> f64 {
    row.iter().zip(values).map(|(factor, value)| factor * value).sum()
}

fn has(set: usize, at: usize) -> bool {
    set >> at & 1 == 1
}

/// The normal equations, with columns scaled to length 1: units differ by orders of magnitude.
struct Normal {
    lengths: [f64; UNKNOWNS],
    products: [[f64; UNKNOWNS]; UNKNOWNS],
    moments: [f64; UNKNOWNS],
}

impl Normal {
    fn of(rows: &[Row]) -> Normal {
        let mut lengths = [0.0; UNKNOWNS];
        for (at, length) in lengths.iter_mut().enumerate() {
            *length = rows.iter().map(|(row, _)| row[at].powi(2)).sum::<f64>().sqrt();
        }
        let (mut products, mut moments) = ([[0.0; UNKNOWNS]; UNKNOWNS], [0.0; UNKNOWNS]);
        for (row, right) in rows {
            let mut scaled = [0.0; UNKNOWNS];
            for at in (0..UNKNOWNS).filter(|at| lengths[*at] > 0.0) {
                scaled[at] = row[at] / lengths[at];
            }
            for at in 0..UNKNOWNS {
                moments[at] += scaled[at] * right;
                for other in 0..UNKNOWNS {
                    products[at][other] += scaled[at] * scaled[other];
                }
            }
        }
        Normal {
            lengths,
            products,
            moments,
        }
    }

    /// The inverse of the products within a set of columns, 0 elsewhere; `None` where a column depends on the others. Gauss and Jordan's way; the matrix
    /// is positive definite, so that the diagonal will do for pivots.
    fn inverse(&self, set: usize) -> Option<[[f64; UNKNOWNS]; UNKNOWNS]> {
        let mut left = self.products;
        let mut right = [[0.0; UNKNOWNS]; UNKNOWNS];
        let columns = || (0..UNKNOWNS).filter(|at| has(set, *at));
        for at in columns() {
            right[at][at] = 1.0;
        }
        for at in columns() {
            let pivot = left[at][at];
            if pivot < PIVOT_MIN {
                return None;
            }
            for column in columns() {
                left[at][column] /= pivot;
                right[at][column] /= pivot;
            }
            for row in columns().filter(|row| *row != at) {
                let factor = left[row][at];
                for column in columns() {
                    left[row][column] -= factor * left[at][column];
                    right[row][column] -= factor * right[at][column];
                }
            }
        }
        Some(right)
    }

    /// The diagonal of the inverse of all columns that have anything in them.
    fn inflations(&self) -> [f64; UNKNOWNS] {
        let there = (0..UNKNOWNS).filter(|at| self.lengths[*at] > 0.0);
        let set = there.fold(0, |set, at| set | 1 << at);
        let inverse = self.inverse(set);
        std::array::from_fn(|at| match &inverse {
            _ if !has(set, at) => 1.0,
            Some(inverse) => inverse[at][at],
            None => f64::INFINITY,
        })
    }

    fn solution(&self, inverse: &[[f64; UNKNOWNS]; UNKNOWNS]) -> [f64; UNKNOWNS] {
        inverse.map(|row| product(&row, &self.moments))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cost(rows: &[Row], values: &[f64; UNKNOWNS]) -> f64 {
        let squares = rows
            .iter()
            .map(|(row, right)| (right - product(row, values)).powi(2));
        squares.sum()
    }

    #[test]
    fn what_the_rows_were_made_of_is_found_in_any_units() {
        let truth = [4e-5, 0.0, 2e-9, 0.008];
        let rows: Vec<Row> = (1..40)
            .map(|n| {
                let n = f64::from(n);
                let row = [
                    n * 1e3,
                    (n * 7.0) % 11.0 * 1e3,
                    (n * 5.0) % 13.0 * 1e7,
                    (n * 3.0) % 17.0 * 100.0,
                ];
                (row, product(&row, &truth))
            })
            .collect();
        let found = solve(&rows);
        for (value, truth) in found.values.into_iter().zip(truth) {
            assert!((value - truth).abs() <= 1e-9 * truth.max(1e-5), "{found:?}");
        }
        assert!(found.errors.iter().all(|error| *error < 1e-10), "{found:?}");
    }

    #[test]
    fn a_column_like_another_one_is_told_by_its_inflation_and_one_that_is_another_is_left_out() {
        let like = |noise: f64| -> Vec<Row> {
            (1..30)
                .map(|n| {
                    let (n, odd) = (f64::from(n), f64::from(n % 2));
                    ([n, 2.0 * n + noise * odd, 0.0, 0.0], 3.0 * n)
                })
                .collect()
        };
        assert!(solve(&like(1.0)).inflations[0] > 100.0);
        let same = solve(&like(0.0));
        assert_eq!(same.inflations, [f64::INFINITY, f64::INFINITY, 1.0, 1.0]);
        assert!(
            same.values.iter().filter(|value| **value > 0.0).count() == 1,
            "{same:?}"
        );
    }

    #[test]
    fn without_rows_all_is_nothing() {
        assert_eq!(solve(&[]).values, [0.0; UNKNOWNS]);
    }

    proptest! {
        /// The conditions that only the optimum of a convex problem meets (Karush, Kuhn, Tucker): along each unknown the slope is 0, or leads below 0.
        #[test]
        fn no_step_in_any_direction_makes_it_better(
            rows in prop::collection::vec((prop::array::uniform4(0.0_f64..1.0), -1.0_f64..4.0), 8..40),
        ) {
            let found = solve(&rows);
            for at in 0..UNKNOWNS {
                let slope: f64 = rows.iter().map(|(row, right)| row[at] * (product(row, &found.values) - right)).sum();
                prop_assert!(found.values[at] >= 0.0);
                prop_assert!(slope > -1e-6, "unknown {} should be larger: {}", at, slope);
                prop_assert!(found.values[at] == 0.0 || slope.abs() < 1e-6, "unknown {}: {}", at, slope);
            }
        }

        #[test]
        fn nothing_else_that_is_not_negative_is_better(
            rows in prop::collection::vec((prop::array::uniform4(0.0_f64..1.0), 0.0_f64..4.0), 4..20),
            other in prop::array::uniform4(prop_oneof![Just(0.0), 0.0_f64..3.0]),
        ) {
            prop_assert!(cost(&rows, &solve(&rows).values) <= cost(&rows, &other) + 1e-9);
        }
    }
}
