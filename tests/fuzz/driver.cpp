// A main() for fuzz targets where libFuzzer is not at hand: gcc's -fsanitize-coverage=trace-pc says which code a run
// reached, and an input that reaches new code joins the corpus in memory. The targets have libFuzzer's interface.
//
//     fuzz_open [--seconds N] [--seed N] [--found FOLDER] CORPUS_FOLDER_OR_FILE...
//
// With --seconds 0 (the default) each input of the corpus runs once. Exit status 0: nothing was found. A sanitizer's
// report, an abort, a leak or a run of more than 2 s of processor time ends the process; the input is then in FOLDER.
#include "random_source.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <csignal>
#include <sys/time.h>
#include <unistd.h>

extern "C" {
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
__attribute__((weak)) size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
void __sanitizer_set_death_callback(void (*callback)());
int __lsan_do_recoverable_leak_check();
void __sanitizer_cov_trace_pc();
// The build hides symbols; the sanitizers' libraries must find these.
__attribute__((visibility("default"))) const char *__asan_default_options();
__attribute__((visibility("default"))) const char *__ubsan_default_options();
}

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t MAX_GROWTH = 1 << 16;
constexpr int HANG_SECONDS = 2;
// One leak check takes as long as some hundred runs.
constexpr uint64_t LEAK_CHECK_RUNS = 20000;
constexpr size_t MAP_SIZE = 1 << 16;

uint8_t reached[MAP_SIZE];
bool tracing = false;
size_t fresh = 0;

std::string found_folder = ".";
const Bytes *current = nullptr;
const char *verdict = "crash";

uint64_t hash(const Bytes &bytes) {
    uint64_t h = 14695981039346656037ull;
    for (const uint8_t byte : bytes) {
        h = (h ^ byte) * 1099511628211ull;
    }
    return h;
}

void keep_current() {
    if (!current) {
        return;
    }
    char name[64];
    std::snprintf(name, sizeof name, "/%s-%016llx", verdict, static_cast<unsigned long long>(hash(*current)));
    std::ofstream((found_folder + name).c_str(), std::ios::binary)
        .write(reinterpret_cast<const char *>(current->data()), static_cast<std::streamsize>(current->size()));
    std::fprintf(stderr, "input kept: %s%s\n", found_folder.c_str(), name);
}

void on_hang(int) {
    verdict = "hang";
    std::fprintf(stderr, "a run took more than %d s of processor time\n", HANG_SECONDS);
    std::abort();
}

void set_timer(int seconds) {
    itimerval timer = {};
    timer.it_value.tv_sec = seconds;
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

// Whether the input reached code that none before it had.
bool run(const Bytes &input) {
    current = &input;
    fresh = 0;
    set_timer(HANG_SECONDS);
    tracing = true;
    LLVMFuzzerTestOneInput(input.data(), input.size());
    tracing = false;
    set_timer(0);
    return fresh > 0;
}

void mutate(Bytes &input, fuzz::Random &random) {
    if (LLVMFuzzerCustomMutator) {
        const size_t size = input.size();
        const auto seed = static_cast<unsigned>(random.next());
        input.resize(size + MAX_GROWTH);
        input.resize(LLVMFuzzerCustomMutator(input.data(), size, input.size(), seed));
        return;
    }
    do {
        const size_t place = random.below(input.size() + 1);
        const size_t count = 1 + random.below(8);
        const auto at = input.begin() + static_cast<ptrdiff_t>(place);
        switch (random.below(4)) {
            case 0: input.insert(at, count, static_cast<uint8_t>(random.next())); break;
            case 1: input.erase(at, at + static_cast<ptrdiff_t>(std::min(count, input.size() - place))); break;
            case 2: {
                const Bytes part(input.begin() + static_cast<ptrdiff_t>(random.below(input.size() + 1)), input.end());
                input.insert(at, part.begin(), part.begin() + static_cast<ptrdiff_t>(std::min(count, part.size())));
                break;
            }
            default:
                if (place < input.size()) {
                    input[place] = static_cast<uint8_t>(fuzz::awkward(random, input[place]));
                }
        }
    } while (!random.one_in(3));
}

void check_leaks() {
    if (__lsan_do_recoverable_leak_check() != 0) {
        verdict = "leak-before";
        std::abort();
    }
}

} // namespace

void __sanitizer_cov_trace_pc() {
    if (tracing) {
        const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
        uint8_t &seen = reached[(pc ^ (pc >> 16)) % MAP_SIZE];
        fresh += seen == 0;
        seen = 1;
    }
}

const char *__asan_default_options() {
    return "handle_abort=1:allocator_may_return_null=1:max_allocation_size_mb=1024:hard_rss_limit_mb=3000:"
           "leak_check_at_exit=0:detect_stack_use_after_return=1";
}

const char *__ubsan_default_options() { return "halt_on_error=1:print_stacktrace=1"; }

int main(int argc, char **argv) {
    long seconds = 0;
    uint64_t seed = static_cast<uint64_t>(getpid());
    std::vector<std::filesystem::path> files;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument.rfind("--", 0) == 0 && i + 1 < argc) {
            const char *value = argv[++i];
            if (argument == "--seconds") {
                seconds = std::atol(value);
            } else if (argument == "--seed") {
                seed = std::strtoull(value, nullptr, 10);
            } else if (argument == "--found") {
                found_folder = value;
            } else {
                std::fprintf(stderr, "unknown option %s\n", argument.c_str());
                return 2;
            }
        } else if (std::filesystem::is_directory(argument)) {
            for (const auto &entry : std::filesystem::directory_iterator(argument)) {
                files.push_back(entry.path());
            }
        } else {
            files.emplace_back(argument);
        }
    }
    std::sort(files.begin(), files.end()); // a folder's order differs between machines
    std::vector<Bytes> corpus;
    for (const auto &path : files) {
        std::ifstream file(path, std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        if (!file) {
            std::fprintf(stderr, "cannot read %s\n", path.c_str());
            return 2;
        }
    }
    if (corpus.empty()) {
        std::fprintf(stderr, "no inputs: give files or a folder of them\n");
        return 2;
    }
    __sanitizer_set_death_callback(keep_current);
    std::signal(SIGVTALRM, on_hang);

    for (const Bytes &input : corpus) {
        run(input);
    }
    uint64_t runs = corpus.size();
    fuzz::Random random(seed);
    const auto begin = std::chrono::steady_clock::now();
    const auto passed = [&] {
        return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto report = [&](const char *when) {
        const auto points = std::count(std::begin(reached), std::end(reached), 1);
        std::fprintf(stderr,
                     "%s: %llu runs in %lld s (%ld s of processor time), %lld points of code reached, %zu inputs, seed "
                     "%llu\n",
                     when, static_cast<unsigned long long>(runs), static_cast<long long>(passed()),
                     static_cast<long>(std::clock() / CLOCKS_PER_SEC), static_cast<long long>(points), corpus.size(),
                     static_cast<unsigned long long>(seed));
    };
    const size_t committed = corpus.size();
    long long next_report = 60;
    while (passed() < seconds) {
        // Half of the runs start from what the run itself has found.
        const bool grown = corpus.size() > committed && random.one_in(2);
        Bytes input = corpus[grown ? committed + random.below(corpus.size() - committed) : random.below(committed)];
        mutate(input, random);
        if (run(input)) {
            corpus.push_back(input);
        }
        ++runs;
        if (runs % LEAK_CHECK_RUNS == 0) {
            check_leaks();
        }
        if (passed() >= next_report) {
            report("running");
            next_report += 60;
        }
    }
    check_leaks();
    report("done");
    return 0;
}
