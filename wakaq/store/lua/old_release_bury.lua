-- Evicts a supervisor of the last release, and keeps its entry as a tombstone, as that release
-- does.
-- KEYS[1]  registry (hash)    KEYS[2]  turns (hash)
-- ARGV[1]  supervisor id    ARGV[2]  field of the tombstone    ARGV[3]  the entry as it was seen
-- Returns 1, or 0 if the entry is another by now: it moved, or others were faster.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[3] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
