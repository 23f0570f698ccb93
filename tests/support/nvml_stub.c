/* A driver library that plays any GPU: the part of NVML's ABI that qlora_tui/gpu asks for.
 *
 * stub.py builds it as libnvidia-ml.so.1. What it plays is chosen by the environment at each nvmlInit:
 *
 *   NVML_STUB_SCENARIO    one of the names in `scenarios` below; "one_gpu" when unset
 *   NVML_STUB_LOST_AFTER  for lost_later and recovers: device questions answered before the GPU is lost
 *   NVML_STUB_PROCESSES   a file that replaces the processes, read at each question: a line for each with its
 *                         number, MiB, the percent of the time in which it keeps the GPU busy, and if it is
 *                         on one GPU only, the number of that
 *
 * Nothing is random and nothing depends on time. Each call of nvmlDeviceGetUtilizationRates is one tick of
 * that GPU, and every other value follows from the number of ticks; so the n-th reading is always the same.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Gpu *nvmlDevice_t;
typedef struct { unsigned gpu, memory; } nvmlUtilization_t;
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } nvmlMemory_v2_t;
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

typedef struct { unsigned pid; unsigned long long at_us; unsigned sm, memory, encoder, decoder; } nvmlSample_t;

_Static_assert(sizeof(nvmlSample_t) == 32, "nvmlProcessUtilizationSample_t");
_Static_assert(sizeof(nvmlUtilization_t) == 8, "nvmlUtilization_t");
_Static_assert(sizeof(nvmlMemory_t) == 24, "nvmlMemory_t");
_Static_assert(sizeof(nvmlMemory_v2_t) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(nvmlProcessInfo_t) == 24, "nvmlProcessInfo_t, versions 2 and 3");

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4,
    NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, LIBRARY_NOT_FOUND = 12, FUNCTION_NOT_FOUND = 13,
    GPU_IS_LOST = 15, MISMATCH = 18, UNKNOWN = 999
};
#define MIB (1024ull * 1024)
#define GIB (1024 * MIB)
#define MEMORY_V2 0x02000028u
#define NOT_AVAILABLE (~0ull)

struct Gpu {
    const char *name, *uuid;
    unsigned long long total, reserved, base_used;
    int major, minor;
    unsigned power_limit_mw, cores;
    int says_little; /* neither fan nor power limit nor throttle reasons, like a laptop */
    unsigned ticks, process_calls;
};

#define RTX_4090(number) \
    { "NVIDIA GeForce RTX 4090", "GPU-4090" number "-1111-2222-3333-444455556666", 24564 * MIB, 430 * MIB, \
      8 * GIB, 8, 9, 450000, 16384, 0, 0, 0 }
static struct Gpu gpus[] = {
    RTX_4090("0001"),
    { "NVIDIA GeForce RTX 3060", "GPU-30600001-1111-2222-3333-444455556666", 12288 * MIB, 240 * MIB,
      1 * GIB, 8, 6, 170000, 3584, 1, 0, 0 },
};
static struct Gpu display_first[] = {
    { "NVIDIA GeForce GT 1030", "GPU-10300001-1111-2222-3333-444455556666", 2048 * MIB, 60 * MIB,
      300 * MIB, 6, 1, 30000, 384, 1, 0, 0 },
    RTX_4090("0001"),
};
static struct Gpu small_gpu[] = {
    { "NVIDIA GeForce RTX 2060", "GPU-20600001-1111-2222-3333-444455556666", 6144 * MIB, 200 * MIB,
      512 * MIB, 7, 5, 160000, 1920, 0, 0, 0 },
};

enum Play { PLAIN, IDLE, HOT, EXCLUSIVE, PROHIBITED, SLICED, UNSUPPORTED, OLD_DRIVER, LOST, LOST_LATER, RECOVERS, BROKEN };
static const struct Scenario {
    const char *name;
    int init_result;
    struct Gpu *gpus;
    unsigned count;
    enum Play play;
} scenarios[] = {
    { "one_gpu", SUCCESS, gpus, 1, PLAIN },              /* RTX 4090, training */
    { "two_gpus", SUCCESS, gpus, 2, PLAIN },         /* beside it an RTX 3060 that says little */
    { "display_first", SUCCESS, display_first, 2, PLAIN }, /* a GT 1030 in the slot before the RTX 4090 */
    { "exclusive", SUCCESS, gpus, 1, EXCLUSIVE },     /* RTX 4090, one program at a time */
    { "prohibited", SUCCESS, gpus, 1, PROHIBITED },   /* RTX 4090, no program may compute */
    { "sliced", SUCCESS, gpus, 1, SLICED },           /* divided by MIG */
    { "small_gpu", SUCCESS, small_gpu, 1, PLAIN },   /* RTX 2060, 6 GiB, no bf16 */
    { "idle", SUCCESS, gpus, 1, IDLE },               /* RTX 4090, nothing runs on it */
    { "hot", SUCCESS, gpus, 1, HOT },                 /* RTX 4090, held back by heat and power */
    { "unsupported", SUCCESS, gpus, 1, UNSUPPORTED }, /* every question: NotSupported */
    { "old_driver", SUCCESS, gpus, 1, OLD_DRIVER },   /* lacks what came after driver 470 */
    { "lost", SUCCESS, gpus, 1, LOST },               /* lost from the start */
    { "lost_later", SUCCESS, gpus, 1, LOST_LATER },   /* lost in mid-run, for good */
    { "recovers", SUCCESS, gpus, 1, RECOVERS },       /* lost in mid-run, back when the driver is reopened */
    { "broken", SUCCESS, gpus, 1, BROKEN },           /* Unknown Error for the GPU */
    { "no_device", SUCCESS, gpus, 0, PLAIN },
    { "no_driver", LIBRARY_NOT_FOUND, NULL, 0, PLAIN },
    { "not_loaded", DRIVER_NOT_LOADED, NULL, 0, PLAIN },
    { "no_permission", NO_PERMISSION, NULL, 0, PLAIN },
    { "mismatch", MISMATCH, NULL, 0, PLAIN },
};

static const struct Scenario *playing;
static unsigned users, questions, lost_after;
static int was_lost, healed;

void nvmlStubReset(void)
{
    playing = NULL;
    users = questions = 0;
    was_lost = healed = 0;
    for (unsigned i = 0; i < sizeof gpus / sizeof *gpus; i++)
        gpus[i].ticks = gpus[i].process_calls = 0;
    small_gpu->ticks = small_gpu->process_calls = 0;
    for (unsigned i = 0; i < sizeof display_first / sizeof *display_first; i++)
        display_first[i].ticks = display_first[i].process_calls = 0;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    const char *wanted = getenv("NVML_STUB_SCENARIO"), *after = getenv("NVML_STUB_LOST_AFTER");
    lost_after = after ? (unsigned)atoi(after) : 100;
    playing = NULL;
    for (unsigned i = 0; i < sizeof scenarios / sizeof *scenarios; i++)
        if (wanted && !strcmp(scenarios[i].name, wanted))
            playing = &scenarios[i];
    if (!playing)
        abort(); /* a test asked for none, or for a scenario that there is not */
    if (playing->init_result != SUCCESS)
        return playing->init_result;
    users++;
    healed = was_lost;
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    if (!users)
        return UNINITIALIZED;
    users--;
    return SUCCESS;
}

const char *nvmlErrorString(int result) { return result == UNKNOWN ? "Unknown Error" : "Stub Error"; }

/* What every question about a GPU meets first. */
static int meet(struct Gpu *gpu)
{
    if (!users)
        return UNINITIALIZED;
    if (!gpu)
        return INVALID_ARGUMENT;
    questions++;
    switch (playing->play) {
    case UNSUPPORTED: return NOT_SUPPORTED;
    case LOST_LATER:
    case RECOVERS:
        if (questions <= lost_after || (playing->play == RECOVERS && healed))
            return SUCCESS;
        was_lost = 1;
        return GPU_IS_LOST;
    default: return SUCCESS;
    }
}
#define MEET(gpu) do { int met = meet(gpu); if (met != SUCCESS) return met; } while (0)
#define MEET_TALKATIVE(gpu) do { MEET(gpu); if ((gpu)->says_little) return NOT_SUPPORTED; } while (0)
#define SINCE_NEWER_DRIVER do { if (playing->play == OLD_DRIVER) return FUNCTION_NOT_FOUND; } while (0)

static int write_text(char *out, unsigned size, const char *text)
{
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    if (!users)
        return UNINITIALIZED;
    if (playing->play == UNSUPPORTED)
        return NOT_SUPPORTED;
    return write_text(version, size, playing->play == OLD_DRIVER ? "470.57.02" : "550.54.14");
}

/* CUDA 12.4, as driver 550 has it, or 11.4. */
int nvmlSystemGetCudaDriverVersion(int *version)
{
    if (!users)
        return UNINITIALIZED;
    if (playing->play == UNSUPPORTED)
        return NOT_SUPPORTED;
    *version = playing->play == OLD_DRIVER ? 11040 : 12040;
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!users)
        return UNINITIALIZED;
    *count = playing->count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *gpu)
{
    if (!users)
        return UNINITIALIZED;
    if (index >= playing->count)
        return INVALID_ARGUMENT;
    if (playing->play == LOST || (playing->play == LOST_LATER && questions > lost_after))
        return GPU_IS_LOST;
    if (playing->play == BROKEN)
        return UNKNOWN;
    *gpu = &playing->gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetName(nvmlDevice_t gpu, char *name, unsigned size)
{
    MEET(gpu);
    return write_text(name, size, gpu->name);
}

int nvmlDeviceGetUUID(nvmlDevice_t gpu, char *uuid, unsigned size)
{
    MEET(gpu);
    return write_text(uuid, size, gpu->uuid);
}

int nvmlDeviceGetCudaComputeCapability(nvmlDevice_t gpu, int *major, int *minor)
{
    MEET(gpu);
    *major = gpu->major;
    *minor = gpu->minor;
    return SUCCESS;
}

/* No question that lost_after counts: those are of readings. */
int nvmlDeviceGetNumGpuCores(nvmlDevice_t gpu, unsigned *cores)
{
    if (!users)
        return UNINITIALIZED;
    if (playing->play == UNSUPPORTED)
        return NOT_SUPPORTED;
    SINCE_NEWER_DRIVER;
    *cores = gpu->cores;
    return SUCCESS;
}

int nvmlDeviceGetComputeMode(nvmlDevice_t gpu, unsigned *mode)
{
    MEET(gpu);
    enum { SHARED = 0, NO_PROGRAM = 2, ONE_PROCESS = 3 };
    *mode = playing->play == EXCLUSIVE ? ONE_PROCESS : playing->play == PROHIBITED ? NO_PROGRAM : SHARED;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(nvmlDevice_t gpu, unsigned *current, unsigned *pending)
{
    MEET(gpu);
    if (playing->play != SLICED)
        return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

static unsigned long long used_by_processes(const struct Gpu *gpu)
{
    return playing->play == IDLE ? 0 : gpu->base_used + gpu->ticks % 32 * 64 * MIB;
}

int nvmlDeviceGetMemoryInfo(nvmlDevice_t gpu, nvmlMemory_t *memory)
{
    MEET(gpu);
    memory->total = gpu->total;
    memory->used = gpu->reserved + used_by_processes(gpu);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t gpu, nvmlMemory_v2_t *memory)
{
    MEET(gpu);
    SINCE_NEWER_DRIVER;
    if (memory->version != MEMORY_V2)
        return INVALID_ARGUMENT;
    memory->total = gpu->total;
    memory->reserved = gpu->reserved;
    memory->used = used_by_processes(gpu);
    memory->free = memory->total - memory->reserved - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(nvmlDevice_t gpu, nvmlUtilization_t *rates)
{
    MEET(gpu);
    gpu->ticks++;
    rates->gpu = playing->play == IDLE ? 0 : 90 + gpu->ticks % 10;
    rates->memory = rates->gpu / 2;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(nvmlDevice_t gpu, unsigned *milliwatts)
{
    MEET(gpu);
    *milliwatts = playing->play == IDLE ? 21500 : gpu->power_limit_mw * 7 / 10 + gpu->ticks % 20 * 1000;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t gpu, unsigned *milliwatts)
{
    MEET_TALKATIVE(gpu);
    *milliwatts = gpu->power_limit_mw;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(nvmlDevice_t gpu, unsigned sensor, unsigned *celsius)
{
    MEET(gpu);
    if (sensor != 0)
        return INVALID_ARGUMENT;
    *celsius = playing->play == IDLE ? 34 : playing->play == HOT ? 88 : 60 + gpu->ticks % 8;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(nvmlDevice_t gpu, unsigned type, unsigned *mhz)
{
    MEET(gpu);
    enum { SM = 1, MEM = 2 };
    if (type == SM)
        *mhz = playing->play == IDLE ? 210 : playing->play == HOT ? 1200 : 2520 + gpu->ticks % 4 * 15;
    else if (type == MEM)
        *mhz = playing->play == IDLE ? 405 : 10501;
    else
        return INVALID_ARGUMENT;
    return SUCCESS;
}

int nvmlDeviceGetFanSpeed(nvmlDevice_t gpu, unsigned *percent)
{
    MEET_TALKATIVE(gpu);
    *percent = playing->play == IDLE ? 0 : 40 + gpu->ticks % 10;
    return SUCCESS;
}

/* Idle; or power cap, hardware slowdown, thermal by software and by hardware. */
static unsigned long long throttle_reasons(void)
{
    return playing->play == IDLE ? 0x1 : playing->play == HOT ? 0x4 | 0x8 | 0x20 | 0x40 : 0;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t gpu, unsigned long long *reasons)
{
    MEET_TALKATIVE(gpu);
    *reasons = throttle_reasons();
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t gpu, unsigned long long *reasons)
{
    MEET_TALKATIVE(gpu);
    SINCE_NEWER_DRIVER;
    *reasons = throttle_reasons();
    return SUCCESS;
}

static int write_processes(const nvmlProcessInfo_t *held, unsigned held_count, unsigned *count,
                           nvmlProcessInfo_t *out)
{
    unsigned room = *count;
    *count = held_count;
    if (held_count == 0)
        return SUCCESS;
    if (room < held_count || !out)
        return INSUFFICIENT_SIZE;
    memcpy(out, held, held_count * sizeof *held);
    return SUCCESS;
}

enum { MOST_PLAYED = 16 };
static int read_played(nvmlDevice_t gpu, nvmlProcessInfo_t *held, unsigned *busy)
{
    const char *path = getenv("NVML_STUB_PROCESSES");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[80];
    unsigned number = 0, pid, mib, percent, index;
    if (!path)
        return -1;
    while (file && number < MOST_PLAYED && fgets(line, sizeof line, file)) {
        int fields = sscanf(line, "%u %u %u %u", &pid, &mib, &percent, &index);
        if (fields < 3 || (fields == 4 && gpu != &playing->gpus[index]))
            continue;
        held[number] = (nvmlProcessInfo_t){ pid, mib * MIB, ~0u, ~0u };
        busy[number++] = percent;
    }
    if (file)
        fclose(file);
    return (int)number;
}

int nvmlDeviceGetProcessUtilization(nvmlDevice_t gpu, nvmlSample_t *out, unsigned *count,
                                    unsigned long long since_us)
{
    MEET(gpu);
    nvmlProcessInfo_t held[MOST_PLAYED];
    unsigned busy[MOST_PLAYED], room = *count;
    int number = read_played(gpu, held, busy);
    if (number <= 0)
        return NOT_FOUND;
    *count = (unsigned)number;
    if (!out || room < *count)
        return INSUFFICIENT_SIZE;
    for (int i = 0; i < number; i++)
        out[i] = (nvmlSample_t){ held[i].pid, since_us + 1, busy[i], 0, 0, 0 };
    return SUCCESS;
}

/* A trainer whose memory grows by 1 MiB each time it is asked for, and one whose memory is not told. */
int nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t gpu, unsigned *count, nvmlProcessInfo_t *out)
{
    MEET(gpu);
    SINCE_NEWER_DRIVER;
    nvmlProcessInfo_t played[MOST_PLAYED];
    unsigned busy[MOST_PLAYED];
    int number = read_played(gpu, played, busy);
    if (number >= 0)
        return write_processes(played, (unsigned)number, count, out);
    if (out)
        gpu->process_calls++;
    nvmlProcessInfo_t held[] = {
        { 5151, NOT_AVAILABLE, ~0u, ~0u },
        { 4242, 7 * GIB + gpu->process_calls * MIB, ~0u, ~0u },
    };
    return write_processes(held, playing->play == IDLE ? 0 : 2, count, out);
}

/* A desktop, and the second process above, which also draws. */
int nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t gpu, unsigned *count, nvmlProcessInfo_t *out)
{
    MEET(gpu);
    SINCE_NEWER_DRIVER;
    if (getenv("NVML_STUB_PROCESSES"))
        return write_processes(NULL, 0, count, out);
    nvmlProcessInfo_t held[] = { { 1001, 350 * MIB, ~0u, ~0u }, { 5151, 90 * MIB, ~0u, ~0u } };
    return write_processes(held, playing->play == IDLE ? 0 : 2, count, out);
}
