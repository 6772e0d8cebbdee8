-- Renews a supervisor's entry, unless others have declared it dead and taken the entry away.
-- KEYS[1]  hash, worker id -> JSON
-- ARGV[1]  worker id    ARGV[2]  JSON
-- Returns 1 if renewed, 0 if the entry is gone.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
-- A write that frees memory comes first: after it, a server that is out of memory accepts the other.
redis.call('HDEL', KEYS[1], '')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
