/* The raw two-hop relay that our cache is measured beside: what this layout of processes can do at most.
 *
 *   relay PAIRS [CREDENTIALS]
 *
 * Prints the ports for producers and for consumers, takes PAIRS of each, answers their greetings, and then moves the bytes
 * of each producer to one consumer without looking at them. One thread reads and another writes, eight blocks between
 * them, so that both sides of a pair are always busy. With a directory of credentials it does so over mutual TLS.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BLOCK = 1024 * 1024, BLOCKS = 8, GATHER = 256 * 1024, SEND_BUFFER = 4 * 1024 * 1024 };

struct peer {
    int fd;
    SSL *tls;
    BIO *out; /* gathers records, so that not each of them is a system call */
};

struct pair {
    struct peer source, sink;
    char *blocks;
    size_t lengths[BLOCKS];
    unsigned filled, emptied; /* ever */
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

static SSL_CTX *context;

static void die(const char *what) {
    perror(what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static int listen_anywhere(int *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, length) || listen(fd, 64) ||
        getsockname(fd, (struct sockaddr *)&address, &length))
        die("listen");
    *port = ntohs(address.sin_port);
    return fd;
}

static ssize_t take(struct peer *peer, char *target, size_t size) {
    if (peer->tls) {
        /* One record after another: return when what has arrived is used up. */
        size_t got = 0;
        do {
            int count = SSL_read(peer->tls, target + got, (int)(size - got));
            if (count <= 0) break;
            got += (size_t)count;
        } while (got < size && SSL_has_pending(peer->tls));
        return (ssize_t)got;
    }
    return recv(peer->fd, target, size, 0);
}

static int give(struct peer *peer, const char *data, size_t size) {
    if (peer->tls) return SSL_write(peer->tls, data, (int)size) == (int)size && BIO_flush(peer->out) == 1;
    while (size) {
        ssize_t count = send(peer->fd, data, size, MSG_NOSIGNAL);
        if (count < 0) return 0;
        data += count;
        size -= (size_t)count;
    }
    return 1;
}

static void exactly(struct peer *peer, char *target, size_t size) {
    while (size) {
        ssize_t count = take(peer, target, size);
        if (count <= 0) die("greeting");
        target += count;
        size -= (size_t)count;
    }
}

static struct peer meet(int listener) {
    int one = 1, buffer = SEND_BUFFER;
    struct peer peer = {.fd = accept(listener, NULL, NULL)};
    char greeting[8];
    if (peer.fd < 0) die("accept");
    setsockopt(peer.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(peer.fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    if (context) {
        BIO *in = BIO_new_socket(peer.fd, BIO_NOCLOSE), *gather = BIO_new(BIO_f_buffer());
        BIO_set_write_buffer_size(gather, GATHER);
        peer.out = BIO_push(gather, BIO_new_socket(peer.fd, BIO_NOCLOSE));
        peer.tls = SSL_new(context);
        SSL_set_bio(peer.tls, in, peer.out);
        if (SSL_accept(peer.tls) != 1) die("handshake");
        BIO_flush(peer.out);
    }
    exactly(&peer, greeting, sizeof greeting);
    greeting[5] ^= 1; /* PUSH is 0x50, PULL is 0x51 */
    if (!give(&peer, greeting, sizeof greeting)) die("greeting");
    return peer;
}

static void *read_all(void *argument) {
    struct pair *pair = argument;
    for (;;) {
        pthread_mutex_lock(&pair->lock);
        while (pair->filled - pair->emptied == BLOCKS) pthread_cond_wait(&pair->changed, &pair->lock);
        pthread_mutex_unlock(&pair->lock);
        unsigned index = pair->filled % BLOCKS;
        ssize_t count = take(&pair->source, pair->blocks + (size_t)index * BLOCK, BLOCK);
        pair->lengths[index] = count > 0 ? (size_t)count : 0;
        pthread_mutex_lock(&pair->lock);
        pair->filled++;
        pthread_cond_signal(&pair->changed);
        pthread_mutex_unlock(&pair->lock);
        if (count <= 0) return NULL;
    }
}

static void *write_all(void *argument) {
    struct pair *pair = argument;
    for (;;) {
        pthread_mutex_lock(&pair->lock);
        while (pair->filled == pair->emptied) pthread_cond_wait(&pair->changed, &pair->lock);
        pthread_mutex_unlock(&pair->lock);
        unsigned index = pair->emptied % BLOCKS;
        if (!pair->lengths[index] || !give(&pair->sink, pair->blocks + (size_t)index * BLOCK, pair->lengths[index]))
            return NULL;
        pthread_mutex_lock(&pair->lock);
        pair->emptied++;
        pthread_cond_signal(&pair->changed);
        pthread_mutex_unlock(&pair->lock);
    }
}

static void prepare_tls(const char *directory) {
    char chain[4096], key[4096], roots[4096];
    snprintf(chain, sizeof chain, "%s/chain.pem", directory);
    snprintf(key, sizeof key, "%s/key.pem", directory);
    snprintf(roots, sizeof roots, "%s/bundle.pem", directory);
    context = SSL_CTX_new(TLS_server_method());
    if (SSL_CTX_use_certificate_chain_file(context, chain) != 1 ||
        SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_load_verify_locations(context, roots, NULL) != 1)
        die(directory);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, GATHER);
}

int main(int count, char **arguments) {
    int pairs = atoi(arguments[1]), producers, consumers;
    pthread_t threads[2 * 64];
    signal(SIGPIPE, SIG_IGN);
    if (count > 2) prepare_tls(arguments[2]);
    int in = listen_anywhere(&producers), out = listen_anywhere(&consumers);
    printf("%d %d\n", producers, consumers);
    fflush(stdout);
    for (int number = 0; number < pairs; number++) {
        struct pair *pair = calloc(1, sizeof *pair);
        pair->blocks = mmap(NULL, (size_t)BLOCK * BLOCKS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(pair->blocks, (size_t)BLOCK * BLOCKS, MADV_HUGEPAGE);
        pthread_mutex_init(&pair->lock, NULL);
        pthread_cond_init(&pair->changed, NULL);
        pair->sink = meet(out);
        pair->source = meet(in);
        pthread_create(&threads[2 * number], NULL, read_all, pair);
        pthread_create(&threads[2 * number + 1], NULL, write_all, pair);
    }
    for (int number = 0; number < 2 * pairs; number++) pthread_join(threads[number], NULL);
    return 0;
}
