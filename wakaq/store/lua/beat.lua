-- Renews a supervisor's entry, unless it is evicted.
-- KEYS[1]  hash, supervisor id -> 'number token gave'    KEYS[2]  hash, supervisor id -> entry
-- ARGV[1]  supervisor id    ARGV[2]  entry (JSON)
-- Returns 1 if renewed, 0 if its number is gone.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[2], '') -- a write that frees memory comes first, see turn.lua
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
