/* The most that ZeroMQ can do between its ends: one thread takes messages and another gives them, a queue between them.
 *
 *   forwarder LIBZMQ DEPTH
 *
 * Prints the ports for producers (PUSH) and for consumers (PULL). DEPTH bounds the queue and the library's own, in messages.
 * The library is that of pyzmq, which comes without its header: hence the few declarations here.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    _Alignas(64) unsigned char opaque[64];
} message;

enum { PULL = 7, PUSH = 8, HIGH_WATER_SEND = 23, HIGH_WATER_RECEIVE = 24, LAST_ENDPOINT = 32 };

static int (*receive)(message *, void *, int);
static int (*send_on)(message *, void *, int);
static int (*begin_empty)(message *);
static void *source, *sink;

static message *queue;
static unsigned depth, filled, emptied; /* ever */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

static void *take_all(void *unused) {
    for (;;) {
        pthread_mutex_lock(&lock);
        while (filled - emptied == depth) pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
        begin_empty(&queue[filled % depth]);
        if (receive(&queue[filled % depth], source, 0) < 0) exit(1);
        pthread_mutex_lock(&lock);
        filled++;
        pthread_cond_signal(&changed);
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void give_all(void) {
    for (;;) {
        pthread_mutex_lock(&lock);
        while (filled == emptied) pthread_cond_wait(&changed, &lock);
        pthread_mutex_unlock(&lock);
        if (send_on(&queue[emptied % depth], sink, 0) < 0) exit(1);
        pthread_mutex_lock(&lock);
        emptied++;
        pthread_cond_signal(&changed);
        pthread_mutex_unlock(&lock);
    }
}

int main(int count, char **arguments) {
    void *library = count == 3 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) {
        fprintf(stderr, "usage: forwarder LIBZMQ DEPTH\n");
        return 1;
    }
    void *(*new_context)(void) = symbol(library, "zmq_ctx_new");
    void *(*new_socket)(void *, int) = symbol(library, "zmq_socket");
    int (*set)(void *, int, const void *, size_t) = symbol(library, "zmq_setsockopt");
    int (*get)(void *, int, void *, size_t *) = symbol(library, "zmq_getsockopt");
    int (*bind_to)(void *, const char *) = symbol(library, "zmq_bind");
    receive = symbol(library, "zmq_msg_recv");
    send_on = symbol(library, "zmq_msg_send");
    begin_empty = symbol(library, "zmq_msg_init");
    void *context = new_context(), **sockets[] = {&source, &sink};
    int kinds[] = {PULL, PUSH}, ports[2], high = atoi(arguments[2]);
    depth = (unsigned)high;
    queue = aligned_alloc(64, depth * sizeof *queue);
    for (int side = 0; side < 2; side++) {
        char endpoint[128];
        size_t length = sizeof endpoint;
        void *socket = *sockets[side] = new_socket(context, kinds[side]);
        set(socket, HIGH_WATER_SEND, &high, sizeof high);
        set(socket, HIGH_WATER_RECEIVE, &high, sizeof high);
        if (bind_to(socket, "tcp://127.0.0.1:*") || get(socket, LAST_ENDPOINT, endpoint, &length)) return 1;
        ports[side] = atoi(strrchr(endpoint, ':') + 1);
    }
    printf("%d %d\n", ports[0], ports[1]);
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, take_all, NULL);
    give_all();
}
