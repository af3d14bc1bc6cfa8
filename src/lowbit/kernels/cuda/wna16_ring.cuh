// What a block of wna16_mma.cu owns: its shared memory, its part of the work, and the rings that bring the weight.
//
// Every warp has a ring of STAGES steps of its own, filled by the copy engine (sm_90: one lane asks for a record and a
// barrier tells when it has come; sm_80: cp.async; sm_75: no ring, plain loads). Filling starts before the kernel
// before has finished: the weight does not depend on it, x does.
#pragma once
#include "wna16_record.cuh"

// WARPS, ROW_TILES (strips a warp works on at once), TOKEN_TILES (8 tokens each), STAGES
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT_ROWS = STRIP * ROW_TILES;
constexpr int TOKENS = 8 * TOKEN_TILES;
constexpr int STEP_BYTES = RECORD_BYTES * ROW_TILES;
constexpr int SUM_PITCH = UNIT_ROWS + 4;  // floats; 4 apart so that the four columns of a lane's quad differ in bank
#if __CUDA_ARCH__ >= 800
constexpr int RING_BYTES = STEP_BYTES * STAGES * WARPS;
#else
constexpr int RING_BYTES = 0;
#endif
// shared memory: ring | barriers | x | sums of x | slots; with a table, FRONT warps' rings | table | rings | barriers ...
constexpr int FRONT_BYTES = TABLE_ADDRESS - 1024;  // up to the table; the system may own the first KiB
constexpr int FITTING = FRONT_BYTES / (STEP_BYTES * STAGES);
constexpr int FRONT = IS_LUT && RING_BYTES ? (FITTING < WARPS ? FITTING : WARPS) : 0;
constexpr int BARRIER_BYTES = (8 * STAGES * WARPS + 15) / 16 * 16;

SHARED_MEMORY(16);

// in a cluster the upper byte of a shared address is the block's rank: keep it (without: "illegal instruction")
DEVICE u32 table_address() { return (shared_address(shared) & 0xFF000000u) + TABLE_ADDRESS; }
DEVICE u8* table_of_block() { return shared + (table_address() - shared_address(shared)); }
DEVICE u8* after_table() { return IS_LUT ? table_of_block() + TABLE_WORDS * 4 : shared; }
DEVICE u8* ring_of(int warp) {
    return warp < FRONT ? shared + warp * STAGES * STEP_BYTES : after_table() + (warp - FRONT) * STAGES * STEP_BYTES;
}
DEVICE u8* barriers_of_block() { return after_table() + RING_BYTES - FRONT * STAGES * STEP_BYTES; }
DEVICE u8* x_of_block() { return barriers_of_block() + BARRIER_BYTES; }

// What a block does: local units 0..count-1, of which i is unit first + i stride; records begin..end-1 of K.
struct Work {
    int first, stride, count, records, begin, end, per_round, rounds;

    DEVICE int length() const { return end - begin; }
    DEVICE int in_round(int round) const { return min(per_round, count - round * per_round) * length(); }
    // the warp whose run holds record `index` of a round of `total` records
    DEVICE static int warp_of(int index, int total) { return ((index + 1) * WARPS - 1) / total; }
};

// A warp's place in its runs, round by round.
struct Cursor {
    const u8* from;  // the records of the unit's strips there; they lie side by side, of a last unit past the end in the padding
    int round, left, local, record;  // left: records to go in this run; local: unit; record: of K

    DEVICE void start(const u8* records, const Work& work, int warp, int first_round) {
        left = local = record = 0;
        for (round = first_round; round < work.rounds; ++round) {
            int total = work.in_round(round), index = total * warp / WARPS;
            left = total * (warp + 1) / WARPS - index;
            local = round * work.per_round + index / work.length(), record = work.begin + index % work.length();
            if (left) break;
        }
        find(records, work);
    }
    DEVICE void find(const u8* records, const Work& work) {
        const int strip = (work.first + local * work.stride) * ROW_TILES;
        from = records + record_index(strip, record, work.records) * RECORD_BYTES;
    }
    DEVICE bool step(const u8* records, const Work& work) {  // to the next record; true where that is in another unit
        --left, ++record, from += UNIT_STRIPS * RECORD_BYTES;
        const bool crossed = record == work.end;
        if (crossed) record = work.begin, ++local, find(records, work);
        return crossed;
    }
};

// The warp's ring of steps. `wait` waits for the oldest step; `refill` hands its place to the step STAGES ahead.
struct Ring {
    const u8* records;
    u8* slots;
    Cursor ahead;
    int slot, lane, warp;
#if __CUDA_ARCH__ >= 900
    u32 barriers, parity;
    u64 policy;
#endif

    DEVICE void start(const u8* weight, const Work& work, int warp_, int lane_) {
        records = weight, warp = warp_, lane = lane_, slot = 0;
        slots = ring_of(warp);
        ahead.start(records, work, warp, 0);
#if __CUDA_ARCH__ >= 900
        barriers = shared_address(barriers_of_block()) + 8 * STAGES * warp, parity = 0, policy = evict_first_policy();
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(barriers + 8 * i, 1);
            barrier_init_fence();
        }
        __syncwarp();
#endif
#if __CUDA_ARCH__ >= 800
        for (int i = 0; i < STAGES; ++i) fill(work, i);
#endif
    }

    DEVICE void fill(const Work& work, int into) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0 && ahead.left) {
            barrier_expect(barriers + 8 * into, STEP_BYTES);
            bulk_copy(shared_address(slots + into * STEP_BYTES), ahead.from, STEP_BYTES, barriers + 8 * into, policy);
        }
#elif __CUDA_ARCH__ >= 800
        if (ahead.left) {
            u32 to = shared_address(slots + into * STEP_BYTES);
            for (int byte = 16 * lane; byte < STEP_BYTES; byte += 512) copy_16(to + byte, ahead.from + byte);
        }
        copies_commit();
#endif
        if (ahead.left) ahead.step(records, work);
        if (!ahead.left && ahead.round + 1 < work.rounds) ahead.start(records, work, warp, ahead.round + 1);
    }

    DEVICE void wait() {
#if __CUDA_ARCH__ >= 900
        barrier_wait(barriers + 8 * slot, parity);
#elif __CUDA_ARCH__ >= 800
        copies_wait<STAGES - 1>();
        __syncwarp();
#endif
    }

    DEVICE const u8* tile(const Cursor& at, int tile) const {
#if __CUDA_ARCH__ >= 800
        return slots + slot * STEP_BYTES + tile * RECORD_BYTES;
#else
        return at.from + tile * RECORD_BYTES;
#endif
    }

    DEVICE void refill(const Work& work) {
#if __CUDA_ARCH__ >= 800
        __syncwarp();  // every lane has read the slot
        fill(work, slot);
        if (++slot == STAGES) {
            slot = 0;
#if __CUDA_ARCH__ >= 900
            parity ^= 1;
#endif
        }
#endif
    }
};
