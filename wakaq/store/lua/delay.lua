-- Delays a payload by a time counted on the server's own clock; a payload that is delayed already
-- keeps its time.
-- KEYS[1]  delayed (zset)
-- ARGV[1]  payload    ARGV[2]  seconds
-- Returns 1 if it is new, 0 if it was there.
local now = redis.call('TIME')
local due = string.format('%.6f', now[1] + now[2] / 1e6 + ARGV[2])
return redis.call('ZADD', KEYS[1], 'NX', due, ARGV[1])
