"""The connection for hot commands: every kind of reply, every way in which none comes, and TLS.

Where a server has to misbehave, a thread of the test plays it: see `play`.
"""

import contextlib
import multiprocessing
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading

import pytest
import redis as redis_py

from wakaq import WakaQ
from wakaq.store.connection import Connection, is_outage, pack

SECRETS = [b"", b"x", b"\r\n", b"\r\n$3\r\nabc\r\n", b"-ERR no\r\n", b"\x00\xff", bytes(range(256))]
MEGABYTE = random.Random(1).randbytes(1_000_000) + b"\r\n"


@pytest.fixture
def make_connection(make_played):  # noqa: ARG001 - whose threads wait for the connections' ends
    """`make_connection(url, **options)` returns a connection to there."""
    with contextlib.ExitStack() as stack:

        def make(url, **options):
            app = WakaQ(queues=["default"], url=url, wait_timeout=0.05, **options)
            stack.callback(app.broker.close)
            connection = Connection(app.broker.client.connection_pool)
            return stack.enter_context(contextlib.closing(connection))

        yield make


@pytest.fixture
def connection(make_connection, app_url):
    return make_connection(app_url)


def ask(connection, *arguments):
    return connection.call(pack(*arguments))


# -- replies ---------------------------------------------------------------------------------------


def test_numbers_nil_and_bulks_are_read(connection):
    assert ask(connection, "INCR", "n") == 1
    assert ask(connection, "DECRBY", "n", 12_345_678_901) == -12_345_678_900
    assert ask(connection, "GET", "n") == b"-12345678900"
    assert ask(connection, "GET", "missing") is None
    assert ask(connection, "LPOP", "missing") is None
    assert ask(connection, "SET", "key", "value") == b"OK"
    assert ask(connection, "EXISTS", "missing") == 0


@pytest.mark.parametrize("secret", [*SECRETS, MEGABYTE], ids=lambda secret: f"{len(secret)} bytes")
def test_bulks_come_back_as_they_were_sent(connection, secret):
    for _ in range(2):
        assert ask(connection, "ECHO", secret) == secret
    assert ask(connection, "RPUSH", "list", secret) == 1
    assert ask(connection, "LPOP", "list") == secret


def test_arguments_are_packed_as_the_server_reads_them(connection):
    assert pack("A", b"\xff", 1, 2.5, "é") == (
        b"*5\r\n$1\r\nA\r\n$1\r\n\xff\r\n$1\r\n1\r\n$3\r\n2.5\r\n$2\r\n\xc3\xa9\r\n"
    )
    assert ask(connection, "ECHO", "é") == "é".encode()
    assert ask(connection, "ECHO", 0.1) == b"0.1"


def test_many_calls_of_all_kinds_get_their_own_replies(connection, redis):
    redis.set("text", "text")
    chance = random.Random(2)
    for number in range(500):
        kind = chance.choice(["int", "bulk", "nil", "error"])
        if kind == "int":
            assert ask(connection, "APPEND", f"key {number}", "x" * number) == number
        elif kind == "bulk":
            secret = chance.randbytes(chance.choice([0, 1, 100, 65_536, 65_537, 200_000]))
            assert ask(connection, "ECHO", secret) == secret
        elif kind == "nil":
            assert ask(connection, "GET", "missing") is None
        else:
            with pytest.raises(redis_py.ResponseError, match="WRONGTYPE"):
                ask(connection, "LPUSH", "text", number)


# -- errors ----------------------------------------------------------------------------------------


def connection_of(connection):
    """Return the server's number for the connection, which shows whether it is the same."""
    return ask(connection, "CLIENT", "ID")


@pytest.mark.parametrize(
    ("command", "kind", "text"),
    [
        (("LPUSH", "text", "a"), redis_py.ResponseError, "WRONGTYPE Operation against a key"),
        (("EVALSHA", "0" * 40, 0), redis_py.exceptions.NoScriptError, "No matching script"),
        (("NONSENSE",), redis_py.ResponseError, "unknown command 'NONSENSE'"),
        (("EVAL", "return redis.error_reply('ÿ')", 0), redis_py.ResponseError, "ÿ"),
    ],
)
def test_errors_are_those_of_redis_py_and_the_connection_goes_on(
    connection, redis, command, kind, text
):
    redis.set("text", "text")
    number = connection_of(connection)
    with pytest.raises(kind, match=text) as caught:
        ask(connection, *command)
    # Exactly what the client's own call raises.
    with pytest.raises(redis_py.RedisError) as expected:
        redis.execute_command(*command)

    assert type(caught.value) is type(expected.value) is kind
    assert str(caught.value) == str(expected.value)
    assert connection_of(connection) == number


def test_a_server_that_is_out_of_memory_says_so(connection, redis):
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis_py.exceptions.OutOfMemoryError):
            ask(connection, "SET", "key", "value")
    finally:
        redis.config_set("maxmemory", 0)
    assert ask(connection, "GET", "key") is None


def test_a_replica_refuses_writes(make_connection, make_server):
    server = make_server()
    with contextlib.closing(server.client()) as client:
        client.replicaof("127.0.0.1", "1")
    connection = make_connection(server.url)
    with pytest.raises(redis_py.exceptions.ReadOnlyError):
        ask(connection, "SET", "key", "value")

    assert ask(connection, "GET", "key") is None


def test_a_missing_and_a_wrong_password_are_told_and_the_right_one_is_sent(
    make_connection, redis_tcp_server
):
    port = redis_tcp_server.port
    for secret in ("", ":wrong@"):
        connection = make_connection(f"redis://{secret}127.0.0.1:{port}")
        for _ in range(2):
            with pytest.raises(redis_py.AuthenticationError):
                ask(connection, "GET", "key")

    assert ask(make_connection(redis_tcp_server.url), "ECHO", "in") == b"in"


def test_a_database_is_chosen_again_after_each_loss(make_connection, app_url, redis):
    connection = make_connection(app_url + "?db=5")
    for _ in range(2):
        ask(connection, "INCR", "n")
        redis.client_kill_filter(_type="normal", skipme=True)

    assert redis.get("n") is None
    assert ask(connection, "GET", "n") == b"2"


@pytest.mark.parametrize(
    ("error", "is_passing"),
    [
        (redis_py.ConnectionError("refused"), True),
        (redis_py.TimeoutError("no answer"), True),
        (redis_py.BusyLoadingError("Redis is loading the dataset in memory"), True),
        (redis_py.exceptions.ReadOnlyError("a replica"), True),
        (redis_py.exceptions.OutOfMemoryError("used memory > 'maxmemory'"), True),
        (redis_py.exceptions.MasterDownError("Link with MASTER is down"), True),
        (redis_py.exceptions.ClusterDownError("The cluster is down"), True),
        (redis_py.exceptions.TryAgainError("during rehashing of slot"), True),
        (redis_py.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (redis_py.ResponseError("MISCONF Errors writing to the AOF file"), True),
        (redis_py.ResponseError("UNBLOCKED client unblocked by a failover"), True),
        (redis_py.ResponseError("Error running script: @user_script:1: -OOM command not"), True),
        (redis_py.ResponseError("WRONGTYPE Operation against a key"), False),
        (redis_py.ResponseError("ERR unknown command 'LOADING'"), False),
        (redis_py.AuthenticationError("invalid password"), False),
        (redis_py.exceptions.AuthorizationError("no permissions"), False),
        (redis_py.exceptions.NoScriptError("No matching script"), False),
        (ValueError("READONLY"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:50],
)
def test_outages_are_what_heals_without_us(error, is_passing):
    assert is_outage(error) is is_passing


# -- servers that misbehave ------------------------------------------------------------------------


GREETINGS = {b"PING": b"+PONG\r\n", b"CLIENT": b"+OK\r\n"}


class Peer:
    """What the played server has of one connection."""

    def __init__(self, sock):
        self.sock = sock
        self._file = sock.makefile("rb")
        self._is_greeting = True

    def read(self):
        """Return the next command, None at the end; answer what redis-py says when it connects."""
        while command := self._read():
            if not self._is_greeting or command[0] not in GREETINGS:
                self._is_greeting = False
                return command
            self.send(GREETINGS[command[0]])
        return None

    def _read(self):
        try:
            head = self._file.readline()
        except ConnectionResetError:  # closed without having read all that was sent
            return None
        sizes = (int(self._file.readline()[1:]) for _ in range(int(head[1:] or 0)))
        return [self._file.read(size + 2)[:-2] for size in sizes]

    def send(self, data):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # they gave up waiting
            self.sock.sendall(data)

    def close(self):
        self._file.close()
        self.sock.close()


class Played:
    """A server that plays a script for each connection, the last one again, each in a thread."""

    def __init__(self, path, scripts, context=None):
        self._scripts = list(scripts)
        self._context = context
        self._threads = [threading.Thread(target=self._accept)]
        self.peers = []
        if context is None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self.url = f"unix://{path}"
        else:
            self._listener = socket.socket()
            self._listener.bind(("127.0.0.1", 0))
            self.url = f"rediss://localhost:{self._listener.getsockname()[1]}"
        self._listener.listen()
        self._threads[0].start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            self.peers.append(sock)
            self._threads.append(threading.Thread(target=self._converse, args=(script, sock)))
            self._threads[-1].start()

    def _converse(self, script, sock):
        if self._context is not None:
            sock = self._context.wrap_socket(sock, server_side=True)
        with contextlib.closing(Peer(sock)) as peer:
            script(peer)

    def wait_for_end(self, number):
        """Wait until the connection of this number, from 1, was closed here."""
        self._threads[number].join(5)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        for thread in self._threads[1:]:
            thread.join()


@pytest.fixture
def make_played(tmp_path):
    """`make_played(*scripts)` returns a server that plays these."""
    with contextlib.ExitStack() as stack:

        def make(*scripts, context=None):
            played = Played(tmp_path / "played.sock", scripts, context)
            return stack.enter_context(contextlib.closing(played))

        yield make


@pytest.fixture
def play(make_played, make_connection):
    """`play(*scripts, **options)` returns a connection to a server that plays these."""
    return lambda *scripts, **options: make_connection(make_played(*scripts).url, **options)


def echo(peer):
    """Answer each command with its last argument."""
    while command := peer.read():
        peer.send(b"$%d\r\n%b\r\n" % (len(command[-1]), command[-1]))


def says(*replies):
    """Play a server that sends these, one for each command, and closes the connection."""

    def script(peer):
        for reply in replies:
            peer.read()
            peer.send(reply)

    return script


def stays(*replies):
    """Play a server that sends these, one for each command, and does not close the connection."""

    def script(peer):
        says(*replies)(peer)
        while peer.read():
            pass

    return script


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"$",
        b"$10",
        b"$10\r",
        b"$10\r\n",
        b"$10\r\nabc",
        b"$3\r\nabc",
        b"$3\r\nabc\r",
        b":1",
        b"-ERR",
    ],
)
def test_a_server_that_closes_in_the_middle_of_a_reply_is_a_connection_error(play, part):
    connection = play(says(part), echo)
    with pytest.raises(redis_py.ConnectionError):
        ask(connection, "GET", "key")

    assert ask(connection, "GET", "next") == b"next"


@pytest.mark.parametrize("part", [b"", b"$", b"$10\r\nabc"])
def test_a_server_that_does_not_answer_in_time_is_a_timeout(play, part):
    connection = play(stays(part), echo, socket_timeout=0.1)
    with pytest.raises(redis_py.TimeoutError):
        ask(connection, "GET", "key")

    # Not on the connection on which the old reply may come yet.
    assert ask(connection, "GET", "next") == b"next"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", redis_py.BusyLoadingError),
        (b"-MASTERDOWN Link with MASTER is down\r\n", redis_py.exceptions.MasterDownError),
        (b"-NOAUTH Authentication required.\r\n", redis_py.AuthenticationError),
        (b"-NOPERM no permissions\r\n", redis_py.exceptions.NoPermissionError),
        (b"-ERR max number of clients reached\r\n", redis_py.ConnectionError),
    ],
)
def test_errors_that_a_healthy_server_does_not_send_have_their_types_too(play, reply, kind):
    connection = play(stays(reply))
    with pytest.raises(kind):
        ask(connection, "GET", "key")


@pytest.mark.parametrize("has_come_together", [False, True])
def test_what_came_unasked_is_no_reply_to_the_next_command(play, has_come_together):
    has_read, has_babbled = threading.Event(), threading.Event()

    def babble(peer):
        peer.read()
        if has_come_together:
            peer.send(b":1\r\n$3\r\nold\r\n")
        else:
            peer.send(b":1\r\n")
            assert has_read.wait(5)
            peer.send(b"$3\r\nold\r\n")
        has_babbled.set()
        echo(peer)

    connection = play(babble, echo)
    assert ask(connection, "GET", "key") == 1
    has_read.set()
    assert has_babbled.wait(5)
    assert ask(connection, "GET", "next") == b"next"


# -- connections that are lost while idle ----------------------------------------------------------


def test_connections_that_were_closed_while_idle_are_replaced_unnoticed(connection, redis):
    numbers = set()
    for _ in range(5):
        numbers.add(connection_of(connection))
        redis.client_kill_filter(_type="normal", skipme=True)

    assert ask(connection, "ECHO", "here") == b"here"
    assert len(numbers) == 5


def test_a_server_that_was_restarted_is_no_error(make_connection, make_server):
    server = make_server()
    connection = make_connection(server.url)
    for stop in (server.stop, server.kill):
        assert ask(connection, "ECHO", "here") == b"here"
        stop()
        server.start()

    assert ask(connection, "ECHO", "again") == b"again"


def test_a_server_that_is_away_is_an_error_at_once_and_is_found_when_it_is_back(
    make_connection, make_server
):
    server = make_server()
    connection = make_connection(server.url)
    ask(connection, "ECHO", "here")
    server.stop()
    for _ in range(2):
        with pytest.raises(redis_py.ConnectionError):
            ask(connection, "ECHO", "lost")
    server.start()

    assert ask(connection, "ECHO", "back") == b"back"


def long_ago(connection):
    """Have redis-py's last check be long ago."""
    connection._connection.next_health_check = 0


def test_after_a_long_time_a_connection_that_answers_is_used_again(connection):
    number = connection_of(connection)
    for _ in range(3):
        long_ago(connection)
        assert connection_of(connection) == number


@pytest.mark.parametrize("answer", [None, b"-LOADING the dataset\r\n"])
def test_after_a_long_time_a_connection_that_leads_nowhere_is_replaced_unnoticed(play, answer):
    asked = []

    def silent(peer):
        peer.read()
        peer.send(b":1\r\n")
        while command := peer.read():
            asked.append(command)
            if answer:
                peer.send(answer)

    connection = play(silent, echo, socket_timeout=0.1)
    assert ask(connection, "GET", "key") == 1
    long_ago(connection)
    assert ask(connection, "GET", "next") == b"next"

    # The command itself was not sent to where nobody could tell whether it was executed.
    assert {tuple(command) for command in asked} == {(b"PING",)}


def test_a_connection_in_use_is_not_checked_with_every_call(play):
    commands = []

    def record(peer):
        while command := peer.read():
            commands.append(command[0])
            peer.send(b":1\r\n")

    connection = play(record)
    for _ in range(20):
        ask(connection, "GET", "key")

    assert commands == [b"GET"] * 20


# -- interruptions ---------------------------------------------------------------------------------


class Interrupted(BaseException):
    """As a SoftTimeout is: raised by a signal's handler, wherever that is."""


@pytest.fixture
def interruptible():
    """Have SIGUSR1 raise `Interrupted`."""

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("part", [b"", b"$", b"$5\r\n", b"$5\r\nol"])
def test_after_an_interruption_the_next_call_reads_its_own_reply(play, part):
    has_next = threading.Event()

    def interrupt(peer):
        peer.read()
        peer.send(part)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        assert has_next.wait(5)
        peer.send(b"$5\r\nold!!\r\n"[len(part) :])

    def answer(peer):
        command = peer.read()
        has_next.set()
        peer.send(b"$%d\r\n%b\r\n" % (len(command[-1]), command[-1]))
        echo(peer)

    connection = play(interrupt, answer)
    with pytest.raises(Interrupted):
        ask(connection, "GET", "key")

    assert ask(connection, "GET", "next") == b"next"
    assert ask(connection, "GET", "other") == b"other"


def interrupted_at(moment, connection):
    """Begin a call, and interrupt it at the latest while it waits for its reply.

    Returns the moments until then: those where Python runs signal handlers, which are the entry of
    a function, and the return of one that is written in C.
    """
    places, sent = [], []

    def interrupt():
        sys.setprofile(None)
        raise Interrupted

    def profile(frame, event, argument):
        name = getattr(argument, "__name__", "")
        if event == "c_return" and name == "sendall":
            sent.append(name)
        if event == "c_call" and name == "recv" and sent:
            interrupt()
        if event in {"call", "c_return"}:
            places.append(f"{event} {frame.f_code.co_name}, line {frame.f_lineno}")
            if len(places) == moment:
                interrupt()

    command = pack("GET", "key")
    try:
        sys.setprofile(profile)
        connection.call(command)
    except Interrupted:
        pass
    finally:
        sys.setprofile(None)
    return places


def test_wherever_a_call_is_interrupted_the_next_one_reads_its_own_reply(
    make_played, make_connection
):
    def late(peer):
        """Answer `key` only when another command has come on the same connection."""
        owed = b""
        while command := peer.read():
            owed += b"$%d\r\n%b\r\n" % (len(command[-1]), command[-1])
            if command[-1] != b"key":
                peer.send(owed)
                owed = b""

    url, misread = make_played(late).url, {}
    for moment in range(1, 100):
        connection = make_connection(url)
        assert ask(connection, "GET", "first") == b"first"
        places = interrupted_at(moment, connection)
        if (reply := ask(connection, "GET", "next")) != b"next":
            misread[places[-1]] = reply
        if len(places) < moment:
            break

    assert 5 < len(places) < 99, "it was not interrupted at every moment"
    assert misread == {}


# -- threads and processes -------------------------------------------------------------------------


@pytest.fixture
def broker(app_url):
    app = WakaQ(queues=["default"], url=app_url)
    with contextlib.closing(app.broker):
        yield app.broker


def test_each_thread_has_a_wire_of_its_own_that_ends_with_it(broker, redis, eventually):
    numbers, barrier = [], threading.Barrier(4)

    def run():
        barrier.wait(5)
        assert broker.connection() is broker.connection()
        numbers.append(connection_of(broker.connection()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def only_ours_is_left():
        assert not {int(client["id"]) for client in redis.client_list()} & set(numbers)

    assert len(set(numbers)) == 4
    eventually(only_ours_is_left)


def test_who_is_owed_a_reply_is_left_alone_and_replaced(broker):
    first = broker.connection()
    first.is_owed = True

    assert broker.connection() is not first
    assert broker.connection() is broker.connection()


def test_a_script_that_the_server_has_forgotten_is_sent_again_and_executed_once(broker, redis):
    (group,) = broker.groups
    redis.hset(group.turns, "me", "0 7")
    for _ in range(2):
        redis.script_flush()
        assert broker.run_script("turn", [group.turns], ["me", 1, "7", 0, 1])

    assert redis.hget(group.turns, "me").startswith(b"1 ")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_that_was_forked_has_a_wire_of_its_own_and_leaves_the_first_alone(broker):
    ours = connection_of(broker.connection())
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run():
        sender.send([connection_of(broker.connection()), connection_of(broker.connection())])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs = receiver.recv() if receiver.poll(10) else None
    process.join(10)
    process.close()
    receiver.close()
    sender.close()

    assert theirs
    assert theirs[0] == theirs[1] != ours
    assert connection_of(broker.connection()) == ours


def test_a_wire_that_was_closed_connects_again(connection):
    connection.close()
    number = connection_of(connection)
    connection.close()
    connection.close()

    assert connection_of(connection) != number


# -- TLS -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The path of a certificate for localhost, and of its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-out", paths[0], "-keyout", paths[1]),
        ],
        check=True,
        capture_output=True,
    )
    return paths


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda one: one.name)
def play_tls(make_played, make_connection, certificate, request):
    """`play_tls(*scripts, **options)` returns a connection to such a server, and the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = request.param
    context.load_cert_chain(*certificate)

    def play(*scripts, **options):
        played = make_played(*scripts, context=context)
        return make_connection(f"{played.url}?ssl_ca_certs={certificate[0]}", **options), played

    return play


def test_replies_come_over_tls_on_one_connection(play_tls):
    connection, played = play_tls(echo)
    for secret in (*SECRETS, MEGABYTE, *SECRETS):
        assert ask(connection, "ECHO", secret) == secret

    assert len(played.peers) == 1


def test_over_tls_too_a_connection_that_was_closed_while_idle_is_replaced(play_tls):
    connection, played = play_tls(says(b":1\r\n"), echo)
    assert ask(connection, "GET", "key") == 1
    # Its end is here as soon as the other side's thread has closed it.
    played.wait_for_end(1)
    assert ask(connection, "GET", "next") == b"next"


def test_over_tls_too_losses_and_silence_are_errors_of_redis_py(play_tls):
    connection, _ = play_tls(says(b"$10\r\nabc"), stays(b"$10\r\nabc"), echo, socket_timeout=0.2)
    with pytest.raises(redis_py.ConnectionError):
        ask(connection, "GET", "key")
    with pytest.raises(redis_py.TimeoutError):
        ask(connection, "GET", "key")

    assert ask(connection, "GET", "next") == b"next"
