/* gcc's unwinder, as Debian builds it, asks glibc where the unwind table of an address is (_dl_find_object(3)). musl has no such function; it can
 * list what is loaded, and a static program is one object. Linked into static builds only, and only where Rust's own library for musl is not to
 * be had (build.rs). */
#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>
#include <stddef.h>

/* The unwinder calls these without a look at whether they are there, by references that are too weak to have the linker fetch them. */
void *const vllm_gateway_for_the_unwinder[] __attribute__((used)) = {
    (void *)pthread_once,        (void *)pthread_mutex_lock,  (void *)pthread_mutex_unlock,
    (void *)pthread_key_create,  (void *)pthread_getspecific, (void *)pthread_setspecific,
};

/* glibc's struct dl_find_object. The unwinder reads eh_frame. */
struct found {
    unsigned long long flags;
    void *map_start;
    void *map_end;
    void *link_map;
    void *eh_frame;
    unsigned long long reserved[7];
};

struct search {
    ElfW(Addr) address;
    struct found *found;
};

static int look(struct dl_phdr_info *object, size_t size, void *argument) {
    struct search *search = argument;
    void *table = NULL;
    int holds_it = 0;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &object->dlpi_phdr[i];
        ElfW(Addr) start = object->dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_GNU_EH_FRAME)
            table = (void *)start;
        if (part->p_type != PT_LOAD || search->address < start || search->address - start >= part->p_memsz)
            continue;
        holds_it = 1;
        search->found->map_start = (void *)start;
        search->found->map_end = (void *)(start + part->p_memsz);
    }
    if (!holds_it || table == NULL)
        return 0;
    search->found->eh_frame = table;
    return 1;
}

int _dl_find_object(void *address, struct found *found) {
    struct search search = {(ElfW(Addr))address, found};
    return dl_iterate_phdr(look, &search) ? 0 : -1;
}
