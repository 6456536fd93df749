import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.loading.loader import BatchLoader, BatchShape


class CountingImages:
    """200 images of 4x6 whose pixels are their number, counting what is read."""

    height, width, channels, bit_depth, fixed_size, holds_latents = 4, 6, 1, 8, True, False

    def __init__(self):
        self.read, self.soon = 0, set()

    def __len__(self):
        return 200

    def read_soon(self, indices):
        self.soon |= set(indices.tolist())

    def gather(self, indices, crops):
        self.read += len(indices)
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 4, 6, 1)).copy()


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 16))
def test_the_rows_of_all_processes_and_micro_steps_are_the_global_batch(per_device, micro_steps, num_processes):
    shapes = [BatchShape(per_device, micro_steps, num_processes, index) for index in range(num_processes)]
    cuts = [list(shape.rows(micro_step)) for micro_step in range(micro_steps) for shape in shapes]
    assert sum(cuts, []) == list(range(shapes[0].global_size)) and {len(cut) for cut in cuts} == {per_device}


def loader(per_device=4, micro_steps=1, num_processes=1, process_index=0, threads=0, images=None, flip=False):
    shape = BatchShape(per_device, micro_steps, num_processes, process_index)
    return BatchLoader(images or CountingImages(), shape, 3, flip, torch.device("cpu"), threads)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resuming_reads_nothing_that_was_trained_on(threads):
    images = CountingImages()
    resumed = list(loader(images=images, threads=threads).iterate(1000, 1003))
    assert images.read == 12  # three steps of four images, not a thousand
    whole = list(loader().iterate(999, 1003))
    for one, other in zip(whole[1:], resumed, strict=True):
        assert np.array_equal(one.indices, other.indices)
        assert torch.equal(one.noise, other.noise) and torch.equal(one.uniforms, other.uniforms)


@pytest.mark.parametrize(("per_device", "micro_steps", "processes"), [(4, 2, 1), (2, 2, 2), (2, 1, 4), (1, 8, 1)])
def test_the_global_batch_does_not_depend_on_its_division(per_device, micro_steps, processes):
    whole = next(loader(per_device=8, flip=True).iterate(5, 6))
    parts = {}
    for rank in range(processes):
        for batch in loader(per_device, micro_steps, processes, rank, flip=True).iterate(5, 6):
            rows = BatchShape(per_device, micro_steps, processes, rank).rows(batch.micro_step)
            parts |= {row: (batch, i) for i, row in enumerate(rows)}
    assert sorted(parts) == list(range(8))
    for row, (batch, i) in parts.items():
        assert batch.indices[i] == whole.indices[row] and batch.uniforms[i] == whole.uniforms[row]
        assert torch.equal(batch.noise[i], whole.noise[row]) and torch.equal(batch.images[i], whole.images[row])


def test_an_epoch_visits_every_image_once():
    batches = loader(per_device=8).iterate(0, 25)
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(200))


def test_batches_are_float32_in_the_range_of_the_model():
    batch = next(loader().iterate(0, 1))
    assert batch.images.dtype == batch.noise.dtype == torch.float32 and batch.images.shape == (4, 1, 4, 6)
    assert torch.allclose(batch.images[:, 0, 0, 0], torch.from_numpy(batch.indices) / 127.5 - 1)


def test_flips_mirror_about_half():
    class Ramp(CountingImages):
        def gather(self, indices, crops):
            return np.tile(np.arange(6, dtype=np.uint8)[None, None, :, None], (len(indices), 4, 1, 1))

    images = torch.cat([batch.images for batch in loader(8, images=Ramp(), flip=True).iterate(0, 40)])
    mirrored = (images[:, 0, 0, 0] > images[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    straight = torch.cat([batch.images for batch in loader(8, images=Ramp()).iterate(0, 4)])
    assert (straight[:, 0, 0, 0] < straight[:, 0, 0, -1]).all()


def test_wider_images_are_cropped_anew_at_every_visit():
    class Wide(CountingImages):
        fixed_size = False
        crops = []

        def gather(self, indices, crops):
            self.crops.append(crops)
            return super().gather(indices, crops)

    images = Wide()
    list(loader(per_device=8, images=images).iterate(0, 50))
    crops = np.concatenate(images.crops)
    assert crops.shape == (400, 2) and crops.min() >= 0 and crops.max() < 1 and len(np.unique(crops[:, 0])) == 400
    assert abs(np.corrcoef(crops.T)[0, 1]) < 0.15


def test_sixteen_bits_keep_their_steps():
    class Deep(CountingImages):
        bit_depth = 16

        def gather(self, indices, crops):
            return np.full((len(indices), 4, 6, 1), 40001, dtype=np.uint16)

    batch = next(loader(images=Deep()).iterate(0, 1))
    assert batch.images[0, 0, 0, 0].item() == pytest.approx(40001 / 32767.5 - 1, abs=1e-6)


@pytest.mark.parametrize("threads", [0, 3])
def test_without_blocks_the_next_batches_are_read_ahead(threads):
    images, ahead = CountingImages(), max(1, threads)
    batches = list(loader(2, 2, images=images, threads=threads).iterate(3, 10))
    assert images.soon >= {int(row) for batch in batches[ahead:] for row in batch.indices}


@pytest.mark.parametrize("threads", [0, 3])
def test_blocks_are_read_ahead_and_before_they_are_wanted(threads):
    class Ahead(CountingImages):
        announced, unannounced = set(), 0

        def read_ahead(self, ranges):
            self.announced = self.announced | {row for first, end in ranges for row in range(first, end)}

        def gather(self, indices, crops):
            self.unannounced += len(set(indices.tolist()) - self.announced)
            return super().gather(indices, crops)

    images = Ahead()
    blocks = BatchLoader(images, BatchShape(8, 1, 1, 0), 3, False, torch.device("cpu"), threads, shuffle_block_size=3)
    batches = list(blocks.iterate(10, 35))
    assert images.unannounced == 0 and images.read == 25 * 8
    resumed = BatchLoader(Ahead(), BatchShape(4, 2, 1, 0), 3, False, torch.device("cpu"), 0, shuffle_block_size=3)
    again = np.concatenate([batch.indices for batch in resumed.iterate(20, 22)])
    assert np.array_equal(again, np.concatenate([batch.indices for batch in batches[10:12]]))
