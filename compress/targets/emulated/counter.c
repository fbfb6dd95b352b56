/* A plugin for qemu's user mode emulation: counts the instructions that one thread executes between two marks.

   The emulated program makes a mark by a system call that no Linux has (`MARK`), with
     1  begin a window    2 end it    3 write everything to the file of the plugin's argument `out=`
   and, for 1, whether the window's blocks are wanted too; for 3, a number N from 1 on to write `OUT.N` instead and to
   count anew from there. Counted are the instructions of every translation block
   that the marking thread starts inside a window; those of other threads are counted apart, as `others`.

   qemu's own header for plugins is in no package of Debian's, so what is used of it is declared here, for the
   versions of the interface given by PLUGIN_VERSION: 1 (qemu 6 to 8.1), 2 (8.2), 3 (9.0) and newer. */

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MARK 0x434d5052 /* "CMPR" */

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { NO_REGISTERS = 0 };

extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
extern void qemu_plugin_register_vcpu_tb_trans_cb(
    qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(
    struct qemu_plugin_tb *tb, void (*callback)(unsigned, void *), int flags, void *data);
extern void qemu_plugin_register_vcpu_syscall_cb(
    qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                          uint64_t, uint64_t, uint64_t, uint64_t));
#if PLUGIN_VERSION < 3
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);
#else
extern size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *to, size_t length);
#endif

EXPORT int qemu_plugin_version = PLUGIN_VERSION;

struct block {
    struct block *next;
    uint64_t address, count;
    uint32_t length; /* instructions */
    uint32_t words[];
};

enum { BUCKETS = 1 << 16, WINDOWS = 1 << 12 };
static struct block *buckets[BUCKETS];
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;
static const char *out;

static volatile int active, profiled;
static volatile unsigned owner;
static uint64_t total, others;
static uint64_t counted[WINDOWS], beside[WINDOWS];
static size_t windows;

static void executed(unsigned thread, void *data)
{
    struct block *block = data;
    if (!active)
        return;
    if (thread == owner) {
        total += block->length;
        if (profiled)
            block->count++;
    } else {
        __atomic_fetch_add(&others, block->length, __ATOMIC_RELAXED);
    }
}

/* The record of this code at this address: the same one however often qemu translates it. */
static struct block *find(uint64_t address, uint32_t length, const uint32_t *words)
{
    struct block **place = &buckets[(address >> 2) * 2654435761u % BUCKETS], *block;
    pthread_mutex_lock(&blocks_lock);
    for (block = *place; block; block = block->next)
        if (block->address == address && block->length == length && !memcmp(block->words, words, 4 * length))
            break;
    if (!block && (block = calloc(1, sizeof *block + 4 * length))) {
        block->address = address;
        block->length = length;
        memcpy(block->words, words, 4 * length);
        block->next = *place;
        *place = block;
    }
    pthread_mutex_unlock(&blocks_lock);
    if (!block)
        abort();
    return block;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t length = qemu_plugin_tb_n_insns(tb);
    uint32_t *words = malloc(4 * length);
    (void)id;
    if (!words)
        abort();
    for (size_t i = 0; i < length; i++) {
        const struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
#if PLUGIN_VERSION < 3
        memcpy(&words[i], qemu_plugin_insn_data(insn), 4);
#else
        qemu_plugin_insn_data(insn, &words[i], 4);
#endif
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, find(qemu_plugin_tb_vaddr(tb), length, words));
    free(words);
}

static void write_out(const char *path)
{
    FILE *file = fopen(path, "w");
    if (!file) {
        perror(path);
        exit(1);
    }
    for (size_t i = 0; i < windows; i++)
        fprintf(file, "window %" PRIu64 " %" PRIu64 "\n", counted[i], beside[i]);
    for (size_t i = 0; i < BUCKETS; i++)
        for (const struct block *block = buckets[i]; block; block = block->next) {
            if (!block->count)
                continue;
            fprintf(file, "block %#" PRIx64 " %" PRIu64 " ", block->address, block->count);
            for (uint32_t k = 0; k < block->length; k++)
                fprintf(file, "%08" PRIx32, block->words[k]);
            fputc('\n', file);
        }
    if (fprintf(file, "end\n") < 0 || fclose(file)) {
        perror(path);
        exit(1);
    }
}

static void write_part(uint64_t number)
{
    char path[4096];
    snprintf(path, sizeof path, "%s.%" PRIu64, out, number);
    write_out(path);
    windows = 0;
    for (size_t i = 0; i < BUCKETS; i++)
        for (struct block *block = buckets[i]; block; block = block->next)
            block->count = 0;
}

static void called(qemu_plugin_id_t id, unsigned thread, int64_t number, uint64_t mark, uint64_t blocks_too,
                   uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != MARK)
        return;
    if (mark == 1) {
        owner = thread;
        total = others = 0;
        profiled = blocks_too != 0;
        active = 1;
    } else if (mark == 2 && active && thread == owner && windows < WINDOWS) {
        active = 0;
        counted[windows] = total;
        beside[windows++] = others;
    } else if (mark == 3 && blocks_too) {
        write_part(blocks_too);
    } else if (mark == 3) {
        write_out(out);
    }
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4))
            out = strdup(argv[i] + 4);
    if (!out) {
        fprintf(stderr, "counter: out=FILE is missing\n");
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
