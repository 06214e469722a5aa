//! A product's first columns, with the short sides of adapters that are made of the same rows beside them (hopper_short.cuh); the other
//! columns are a launch of their own.

use super::super::adapter::{PADDING, Projected, Pulled, SHARING, assert_rank, padded};
use super::super::{Adapter, assert_shapes};
use super::{CLUSTER, TILE_M, Tile, clusters};
use crate::cuda::{Args, DeviceSlice, Gpu, Result, TensorMap};
use half::bf16;

/// What there is of a product, of which [`super::super::fused`] and [`super::super::nn_together`] make the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "the rest of the product goes on from here"]
pub struct Begun {
    /// Of the output.
    pub(in super::super) columns: usize,
    /// Of the gradients that came along.
    pub(in super::super) tasks: usize,
}

impl Begun {
    /// Where no product begins.
    pub(in super::super) fn assert_nothing(self, op: &str) {
        assert_eq!(self, Self::default(), "{op}: another product has begun");
    }
}

/// How many groups of 16 of the ranks a kernel may be compiled for.
pub(in super::super) const SHORT_GROUPS: [u32; 3] = [1, 2, 4];
/// Rows of a box of what lies along the sum.
const BOX_ALONG: u32 = PADDING as u32;
/// Rows of a box of what lies across it: half of a slice.
const BOX_ACROSS: u32 = super::SLICE as u32 / CLUSTER;

/// An adapter's short side that is to be made, `left right`, and its long one, if the product at hand goes on with it.
pub(in super::super) struct Short<'a> {
    right: &'a DeviceSlice<bf16>,
    made: &'a mut DeviceSlice<bf16>,
    rank: usize,
    long: Option<&'a DeviceSlice<bf16>>,
}

impl<'a> From<Projected<'a>> for Short<'a> {
    fn from(Projected { a, u, rank, b }: Projected<'a>) -> Self {
        Self { right: a, made: u, rank, long: b }
    }
}

impl<'a> From<Pulled<'a>> for Short<'a> {
    fn from(Pulled { b, du, rank, a }: Pulled<'a>) -> Self {
        Self { right: b, made: du, rank, long: a }
    }
}

/// Those of up to three layers.
pub(in super::super) type Shorts<'a> = [Option<Short<'a>>; SHARING];

/// An adapter's factors in a launch.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    /// None: it is made by the launch.
    pub left: Option<&'a DeviceSlice<bf16>>,
    pub right: &'a DeviceSlice<bf16>,
    pub rank: usize,
}

impl Factors<'_> {
    pub(in super::super) fn assert_fits(op: &str, factors: Option<Self>, m: usize, columns: usize) {
        let Some(Self { left, right, rank }) = factors else { return };
        if let Some(left) = left {
            assert_shapes(op, [("the adapter's left", left.len(), m, rank)]);
        }
        assert_shapes(op, [("its right", right.len(), columns, rank)]);
    }
}

impl<'a> From<Adapter<'a>> for Factors<'a> {
    fn from(Adapter { left, right, rank }: Adapter<'a>) -> Self {
        Self { left: Some(left), right, rank: padded(rank) }
    }
}

/// Which columns of an output `[m, columns]` a launch makes, and which short sides beside them.
pub(in super::super) struct Columns<'a> {
    pub tile: Tile,
    /// Of the output that a tile makes.
    width: usize,
    pub first: usize,
    /// Tiles beside each other.
    pub across: u32,
    pub shorts: Shorts<'a>,
}

impl<'a> Columns<'a> {
    /// Those that are not there yet.
    pub fn rest(tile: Tile, width: usize, columns: usize, begun: Begun) -> Self {
        let first = begun.columns;
        let fits = first == columns || first < columns && first.is_multiple_of(width);
        assert!(fits, "{first} of {columns} columns are there: another product has begun");
        let across = (columns - first).div_ceil(width) as u32;
        Self { tile, width, first, across, shorts: Default::default() }
    }

    /// The first, with `shorts` beside them, such that both launches are done soonest; of so many rows, columns and slices.
    pub fn begin(
        clusters: u32,
        tile: Tile,
        width: usize,
        [m, columns, slices]: [usize; 3],
        shorts: Shorts<'a>,
    ) -> Self {
        let ranks = shorts.iter().flatten().map(|it| it.rank);
        let groups = groups_of(ranks).expect("so many fit one kernel");
        let (down, across) = (m.div_ceil((CLUSTER * TILE_M) as usize), columns.div_ceil(width));
        let first = first_columns(clusters as usize, down, across, slices);
        Self { tile: tile.with_short(groups), width, first: 0, across: first as u32, shorts }
    }

    /// What of a product there is once it is launched.
    pub fn begun(&self, columns: usize) -> Begun {
        let end = self.first + self.across as usize * self.width;
        Begun { columns: end.min(columns), tasks: 0 }
    }

    pub fn none(&self) -> bool {
        self.across == 0
    }

    /// Pairs of tiles, of which a cluster makes one at a time.
    pub fn pairs(&self, m: usize) -> u32 {
        self.across * m.div_ceil((CLUSTER * TILE_M) as usize) as u32
    }

    /// As many clusters as run at once, none without a tile.
    pub fn grid(&self, gpu: &Gpu, m: usize) -> [u32; 3] {
        [clusters(gpu).min(self.pairs(m)) * CLUSTER, 1, 1]
    }

    /// What the product goes on with: of layer `i`.
    pub fn factors(&self, i: usize) -> Option<Factors<'a>> {
        let Short { long, rank, .. } = self.shorts[i].as_ref()?;
        Some(Factors { left: None, right: (*long)?, rank: padded(*rank) })
    }

    /// Refuses short sides that do not fit `m` rows, sums of these depths and the output's columns.
    pub fn assert_shorts(&self, op: &str, m: usize, depths: [usize; SHARING], columns: usize) {
        for (short, depth) in self.shorts.iter().zip(depths) {
            let Some(Short { right, made, rank, long }) = short else { continue };
            assert_rank(op, *rank);
            let rank = padded(*rank);
            let right = ("the short side's factor", right.len(), rank, depth);
            assert_shapes(op, [right, ("the short side", made.len(), m, rank)]);
            if let Some(long) = long {
                assert_shapes(op, [("the long side", long.len(), columns, rank)]);
            }
        }
    }
}

/// How many groups a kernel has that makes short sides of these ranks; none where there are none, or too many for one kernel.
pub(in super::super) fn groups_of(ranks: impl Iterator<Item = usize>) -> Option<u32> {
    let groups = ranks.map(|rank| padded(rank) / PADDING).sum();
    SHORT_GROUPS.into_iter().find(|most| (1..=*most as usize).contains(&groups))
}

/// `Short` of hopper_short.cuh: maps, what is made, where the second and the third begin and all end. `any`: in the place of what is not
/// there. Of each layer the depth of its sum, along which `right` lies or across.
pub(in super::super) fn with_shorts<'a>(
    gpu: &Gpu,
    args: Args<'a>,
    shorts: Shorts<'a>,
    any: TensorMap<'a>,
    depths: [usize; SHARING],
    along: bool,
) -> Result<Args<'a>> {
    let mut maps = [any; SHARING];
    let mut made = [const { None }; SHARING];
    let (mut ends, mut end) = ([0; SHARING], 0);
    for (i, short) in shorts.into_iter().enumerate() {
        if let Some(Short { right, made: to, rank, .. }) = short {
            let rank = padded(rank);
            maps[i] = match along {
                true => gpu.tensor_map(right, [rank, depths[i]], BOX_ALONG)?,
                false => gpu.tensor_map(right, [depths[i], rank], BOX_ACROSS)?,
            };
            end += (rank / PADDING) as i32;
            made[i] = Some(to);
        }
        ends[i] = end;
    }
    let args = maps.into_iter().fold(args, Args::with);
    let args = made.into_iter().fold(args, Args::with);
    Ok(ends.into_iter().fold(args, Args::with))
}

/// Of `across` tiles beside each other and `down` pairs of them below, how many are made with short sides: such that both launches are
/// done soonest.
fn first_columns(clusters: usize, down: usize, across: usize, slices: usize) -> usize {
    // In sixteenths of a slice: what short sides take, few columns as much as 64, what writing takes, and another launch.
    const SHORT: usize = 4;
    const PIECES: usize = 32;
    const START: usize = 150;
    let rounds = |tiles: usize| tiles.div_ceil(clusters);
    let (short, plain) = ((16 + SHORT) * slices + PIECES, 16 * slices + PIECES);
    let time = |first: usize| {
        let rest = across - first;
        let after = if rest > 0 { START + rounds(down * rest) * plain } else { 0 };
        rounds(down * first) * short + after
    };
    (1..=across).min_by_key(|first| time(*first)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_columns_fill_whole_rounds() {
        let first = |down, across| first_columns(66, down, across, 64);
        // One of 16, 64 of 66 clusters.
        assert_eq!(first(64, 16), 1);
        // As many as clusters at once.
        assert_eq!(first(16, 20), 4);
        assert_eq!(first(32, 16), 2);
        // Two launches would take a round more.
        assert_eq!(first(40, 16), 3);
        // All in one.
        assert_eq!(first(1, 16), 16);
        assert_eq!(first(4, 16), 16);
        assert_eq!(first(64, 0), 0);
    }
}
