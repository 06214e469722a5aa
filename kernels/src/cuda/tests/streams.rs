//! Copies beside launches: numbers come back as they went, and a wait that is forgotten shows.

use super::*;

/// Numbers go to the host's memory and back while others take their place; whether they come back.
fn come_back(gpu: &Gpu, numbers: &[f32]) -> Result<bool> {
    let reverse = |from: &DeviceSlice<f32>, to: &mut DeviceSlice<f32>| {
        gpu.launch(&kernel("reverse", 128), [4, 1, 1], 512, args![from, to])
    };
    let room = 3 * size_of_val(numbers);
    let (arena, offload) = (Arena::new(gpu, room)?, Offload::new(gpu, size_of_val(numbers))?);
    let take = || arena.take::<f32>(numbers.len());
    let input = gpu.uploaded(numbers)?;
    let mut away = take()?;
    reverse(&input, &mut away)?;
    let (held, leaving) = offload.send(away)?;
    let mut meanwhile = take()?;
    reverse(&input, &mut meanwhile)?;
    drop(leaving.wait()?);
    // The place of what has left, and of what comes.
    let mut other = take()?;
    reverse(&meanwhile, &mut other)?;
    drop(other);
    let coming = offload.fetch(held, take()?)?;
    let mut meanwhile_again = take()?;
    reverse(&input, &mut meanwhile_again)?;
    let back = coming.wait()?;
    let mut out = gpu.alloc(numbers.len())?;
    reverse(&back, &mut out)?;
    assert_eq!((arena.high_water(), offload.high_water()), (room, size_of_val(numbers)));
    Ok(gpu.downloaded(&out)? == numbers)
}

#[test]
fn what_left_comes_back_beside_launches() {
    let numbers = random(512, 1);
    let late = [Gpu::emulated_late(1).unwrap(), Gpu::emulated_with_early_copies(1).unwrap()];
    for gpu in late.into_iter().chain([crate::testing::gpu(1)]) {
        assert!(come_back(&gpu, &numbers).unwrap());
        assert!(come_back(&gpu, &numbers).unwrap(), "once more");
    }
}

#[test]
fn each_wait_that_is_forgotten_shows() {
    let numbers = random(512, 1);
    let said = |early_copies, forgotten| {
        let gpu = Gpu::emulated_without_order(early_copies, forgotten).unwrap();
        match come_back(&gpu, &numbers) {
            Ok(true) => "nothing".to_owned(),
            Ok(false) => "wrong numbers".to_owned(),
            Err(error) => error.to_string(),
        }
    };
    // Of the copy for what it reads, of launches for what they write over, and the same on the way back.
    assert_eq!(said(true, 0), "wrong numbers");
    assert_eq!(said(false, 1), "a copy beside launches: its buffer has been given back");
    let used = "a copy beside launches: its buffer's memory is still in use as another's";
    assert_eq!(said(true, 2), used);
    assert_eq!(said(false, 3), "wrong numbers");
    // There are no more.
    assert_eq!(said(true, 4), "nothing");
    assert_eq!(said(false, 4), "nothing");
}

/// A buffer that nobody waits for is not lent to others while it is copied.
#[test]
fn what_is_not_waited_for_is_when_it_is_dropped() {
    let numbers = random(512, 1);
    let gpu = Gpu::emulated_late(1).unwrap();
    let (arena, offload) = (Arena::new(&gpu, 1 << 20).unwrap(), Offload::new(&gpu, 0).unwrap());
    let mut buffer = arena.take(numbers.len()).unwrap();
    gpu.upload(&numbers, &mut buffer).unwrap();
    let (held, leaving) = offload.send(buffer).unwrap();
    drop(leaving);
    drop(offload.fetch(held, arena.take(numbers.len()).unwrap()).unwrap());
    gpu.synchronize().unwrap();
}
